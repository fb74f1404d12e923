// A second SIGINT or SIGTERM ends the process.
#pragma once

namespace ag {

// From now on the first of the two goes to whoever hears it already, and the next ends the process at once with status
// 130 or 143, whatever its threads are doing: an event loop that waits for a kernel hears nothing. Off: as before.
// Windows: nothing.
void second_signal_ends(bool on);

}  // namespace ag
