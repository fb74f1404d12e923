#include "signals.h"

#ifdef _WIN32
void ag::second_signal_ends(bool) {}
#else
#include <signal.h>
#include <unistd.h>

#include <atomic>

namespace ag {

static constexpr int kSignals[2] = {SIGINT, SIGTERM};
static struct sigaction before[2];
static std::atomic<bool> heard{false};
static bool installed = false;

// Only what a signal handler may do.
static void on_signal(int number, siginfo_t* info, void* context) {
  if (heard.exchange(true)) {
    static const char text[] = "\nstopped at once; what was saved before stays\n";
    const auto written = write(STDERR_FILENO, text, sizeof text - 1);
    (void)written;
    _exit(128 + number);
  }
  const struct sigaction& first = before[number == SIGINT ? 0 : 1];
  if (first.sa_flags & SA_SIGINFO)
    first.sa_sigaction(number, info, context);
  else if (first.sa_handler != SIG_DFL && first.sa_handler != SIG_IGN)
    first.sa_handler(number);
}

void second_signal_ends(bool on) {
  if (on == installed) return;
  installed = on;
  heard = false;
  for (int i = 0; i < 2; i++) {
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    sigfillset(&action.sa_mask);
    if (on)
      sigaction(kSignals[i], &action, &before[i]);
    else
      sigaction(kSignals[i], &before[i], nullptr);
  }
}

}  // namespace ag
#endif
