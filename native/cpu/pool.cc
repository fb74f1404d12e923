#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace {

// CPUs this process may really use: affinity mask, cut down by the cgroup's quota (v2, then v1).
int available_cpus() {
  int n = int(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
  long long quota = -1, period = 100000;
  if (std::FILE* f = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    char text[32] = {0};
    if (std::fscanf(f, "%31s %lld", text, &period) == 2 && std::strcmp(text, "max") != 0) quota = std::atoll(text);
    std::fclose(f);
  } else if (std::FILE* q = std::fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "r")) {
    if (std::fscanf(q, "%lld", &quota) != 1) quota = -1;
    std::fclose(q);
    if (std::FILE* p = std::fopen("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "r")) {
      if (std::fscanf(p, "%lld", &period) != 1) period = 100000;
      std::fclose(p);
    }
  }
  if (quota > 0 && period > 0) {
    int by_quota = int((quota + period - 1) / period);
    if (by_quota < n) n = by_quota;
  }
#endif
  return n < 1 ? 1 : n > 1024 ? 1024 : n;
}

int wanted_threads() {
  if (const char* text = std::getenv("ALIGNGPT_THREADS")) {
    int n = std::atoi(text);
    if (n >= 1 && n <= 1024) return n;
  }
  return available_cpus();
}

// Where sleeping workers wake up. Left to itself the kernel often puts one on the CPU of the thread that woke it,
// although another is idle, and takes 10 ms and more to move it: so the caller's CPU is closed to them until they run.
struct Places {
#if defined(__linux__)
  cpu_set_t all, others;
  void look() {
    int cpu = sched_getcpu();
    if (sched_getaffinity(0, sizeof all, &all) != 0 || cpu < 0 || cpu >= CPU_SETSIZE) CPU_ZERO(&all);
    others = all;
    if (CPU_COUNT(&all) > 1) CPU_CLR(cpu, &others);
  }
  // Refused (the machine has more CPUs than a set holds, or they changed): the worker stays where it may be.
  void close(pthread_t worker) const { pthread_setaffinity_np(worker, sizeof others, &others); }
  void open() const { sched_setaffinity(0, sizeof all, &all); }
#else
  void look() {}
  void close(std::thread::native_handle_type) const {}
  void open() const {}
#endif
};

struct Pool {
  std::atomic<int> threads{wanted_threads()};
  std::mutex busy;  // one caller at a time; others run inline
  std::mutex m;
  std::condition_variable wake;
  std::atomic<uint64_t> generation{0};
  struct Worker {
    std::thread::native_handle_type thread;
    bool asleep = false;
  };
  std::vector<Worker> workers;  // alive; worker i has the id i + 1
  Places places;

  // the current job
  std::atomic<int64_t> next{0};
  std::atomic<int> inside{0};  // workers in drain()
  int64_t n = 0;
  int helpers = 0;
  void (*body)(void*, int64_t, int64_t) = nullptr;
  void* arg = nullptr;

  void drain(int64_t worker) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(arg, i, worker);
  }

  void loop(int id, uint64_t seen) {
    for (;;) {
      for (int spin = 0; spin < 4000 && generation.load(std::memory_order_acquire) == seen; spin++) pause();
      if (generation.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(m);
        workers[size_t(id - 1)].asleep = true;
        wake.wait(lock, [&] { return generation.load(std::memory_order_acquire) != seen; });
        workers[size_t(id - 1)].asleep = false;
        places.open();
      }
      bool mine;
      {  // both under the lock: a worker that was not needed must not mistake the next job for this one
        std::lock_guard<std::mutex> lock(m);
        seen = generation.load(std::memory_order_acquire);
        mine = id <= helpers;
        if (mine) inside.fetch_add(1, std::memory_order_relaxed);
      }
      if (mine) {
        drain(id);
        inside.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  // Detached: workers sleep at process exit and are ended with it; joining there could deadlock. Fewer workers than
  // wanted is not an error, the caller does what nobody else does.
  void start(int wanted) {
    try {
      while (int(workers.size()) < wanted) {
        workers.reserve(workers.size() + 1);
        std::thread t([this, id = int(workers.size()) + 1, seen = generation.load()] { loop(id, seen); });
        workers.push_back(Worker{t.native_handle()});
        t.detach();
      }
    } catch (const std::system_error&) {
    }
  }

  // Before sleeping workers are woken.
  void place(int wanted) {
    bool looked = false;
    for (int i = 0; i < wanted && i < int(workers.size()); i++) {
      if (!workers[size_t(i)].asleep) continue;
      if (!looked) places.look();
      looked = true;
      places.close(workers[size_t(i)].thread);
    }
  }

  static void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  void run(int64_t count, int64_t workers, void (*f)(void*, int64_t, int64_t), void* a) {
    int use = threads.load();
    if (use > workers) use = int(workers);
    if (use > count) use = int(count);
    if (use > 1 && busy.try_lock()) {
      {
        std::lock_guard<std::mutex> lock(m);
        start(use - 1);
        place(use - 1);
        n = count;
        body = f;
        arg = a;
        helpers = use - 1;
        next.store(0, std::memory_order_relaxed);
        generation.fetch_add(1, std::memory_order_release);
      }
      wake.notify_all();
      drain(0);
      {  // nothing is left to hand out: a worker still waking up need not be waited for
        std::lock_guard<std::mutex> lock(m);
        helpers = 0;
      }
      for (int spin = 0; inside.load(std::memory_order_acquire) > 0;) {
        if (++spin < 4000)
          pause();
        else
          std::this_thread::yield();  // more threads than CPUs: let the worker run
      }
      busy.unlock();
      return;
    }
    for (int64_t i = 0; i < count; i++) f(a, i, 0);
  }
};

// Never destroyed: detached workers refer to it. A forked child has no workers and takes a fresh pool.
std::atomic<Pool*> g_pool{nullptr};
thread_local bool t_inside = false;

Pool& pool() {
  static const bool once = [] {
    g_pool = new Pool();
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] {
      int threads = g_pool.load()->threads.load();
      g_pool = new Pool();
      g_pool.load()->threads = threads;
      t_inside = false;
    });
#endif
    return true;
  }();
  (void)once;
  return *g_pool.load(std::memory_order_acquire);
}

}  // namespace

void ag_parallel(int64_t n, int64_t workers, void (*body)(void*, int64_t, int64_t), void* arg) {
  if (n <= 0) return;
  if (t_inside || n == 1) {
    for (int64_t i = 0; i < n; i++) body(arg, i, 0);
    return;
  }
  t_inside = true;
  pool().run(n, workers, body, arg);
  t_inside = false;
}

int ag_threads() { return pool().threads.load(); }
void ag_set_threads(int n) { pool().threads.store(n < 1 ? 1 : n > 1024 ? 1024 : n); }
