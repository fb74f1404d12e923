// One process-wide pool. Work is cut into chunks by shape, chunks are handed out by a counter: results cannot depend
// on the number of threads. A nested call, and a second caller while the pool is busy, run inline.
#pragma once
#include <cstdint>

// Runs body(arg, i, worker) for i in 0..n-1; worker < workers names a scratch area no other thread uses meanwhile.
void ag_parallel(int64_t n, int64_t workers, void (*body)(void* arg, int64_t i, int64_t worker), void* arg);
int ag_threads();
void ag_set_threads(int n);
