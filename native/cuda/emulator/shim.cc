// The scheduler of the host emulation (shim.h). Compiled without ThreadSanitizer's instrumentation: what it does with
// its own state is not part of the program that is tested.
#include "shim.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#if !defined(__x86_64__)
#error "the emulation switches stacks with x86-64 instructions"
#endif

#if defined(AG_SHIM_TSAN)  // this file itself is compiled without -fsanitize=thread, so it is told
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
// What runs between the two is the emulation's own, though it is compiled with the kernels.
static void ignore_begin() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
static void ignore_end() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
#else
static void ignore_begin() {}
static void ignore_end() {}
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void* __tsan_get_current_fiber() { return nullptr; }
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif

// Saves the registers a call preserves and the stack pointer in *save, and goes on where `to` was saved.
extern "C" void ag_shim_switch(void** save, void* to);
asm(R"(.text
.globl ag_shim_switch
.hidden ag_shim_switch
.type ag_shim_switch,@function
ag_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ag_shim_switch, .-ag_shim_switch
)");

namespace shim {

Here here;
uint64_t launches = 0;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr unsigned kGreedy = 1000;
enum State { kReady, kAtBarrier, kInCollective, kPolling, kLeft };

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  void* sanitizer = nullptr;  // ThreadSanitizer's name for it
  dim3 index;
  int number = 0, line = 0;
  State state = kReady;
  uint64_t waits_for = 0;  // the round of the barrier or collective it is in
  std::vector<Copy> open;  // cp.async since the last commit
  std::vector<std::vector<Copy>> groups;
  size_t landed = 0;  // of groups.front()
};

struct Warp {
  int arrived = 0, alive = 0;
  uint64_t round = 0;
  const char* what[2];  // of this round and the one before, which lanes may still be reading
  Words in[2][32], out[2][32];
  char sync[2];  // addresses for ThreadSanitizer
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int threads = 0, alive = 0, arrived = 0;
  uint64_t round = 0;
  char sync[2], begun, ended;  // addresses for ThreadSanitizer
  Fiber* running = nullptr;
  void* host_sp = nullptr;
  void* host_sanitizer = nullptr;
  const std::function<void()>* body = nullptr;
  char* shared = nullptr;
  size_t shared_bytes = 0;
};
Block& b = *new Block();  // never destroyed: its stacks serve every launch
unsigned schedule = 0;

Warp& warp_of(const Fiber& f) { return b.warps[size_t(f.number / 32)]; }

void pause() {
  __tsan_switch_to_fiber(b.host_sanitizer, 1);
  ag_shim_switch(&b.running->sp, b.host_sp);
}

void thread_main() {
  __tsan_acquire(&b.begun);
  (*b.body)();
  Fiber& f = *b.running;
  if (!f.open.empty() || !f.groups.empty()) die("a cp.async is still in flight where its thread ends");
  if (warp_of(f).arrived) die("a thread leaves while its warp waits in a collective");
  if (b.arrived) die("a thread leaves while others wait at __syncthreads");
  warp_of(f).alive--;
  b.alive--;
  f.state = kLeft;
  __tsan_release(&b.ended);
  for (;;) pause();
}

void start(Fiber& f, int number) {
  if (!f.stack) {
    f.stack = static_cast<char*>(std::aligned_alloc(64, kStack));
    f.sanitizer = __tsan_create_fiber(0);
  }
  unsigned n = unsigned(number);
  f.number = number;
  f.index =
      dim3(n % here.block_dim.x, n / here.block_dim.x % here.block_dim.y, n / (here.block_dim.x * here.block_dim.y));
  f.state = kReady;
  void** sp = reinterpret_cast<void**>(f.stack + kStack - 64);
  *--sp = nullptr;  // where a caller's address would be: keeps the stack aligned as the ABI wants it
  *--sp = reinterpret_cast<void*>(thread_main);
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  f.sp = sp;
}

bool resume(Fiber& f) {
  bool ready = f.state == kReady || f.state == kPolling || (f.state == kAtBarrier && b.round > f.waits_for) ||
               (f.state == kInCollective && warp_of(f).round > f.waits_for);
  if (!ready) return false;
  f.state = kReady;
  b.running = &f;
  here.thread = f.index;
  __tsan_switch_to_fiber(f.sanitizer, 1);
  ag_shim_switch(&b.host_sp, f.sp);
  return f.state != kPolling;  // it looked, and nothing had happened
}

// One round over all threads; false when none could go on.
bool sweep(const std::vector<int>& order) {
  bool any = false;
  if (schedule < kGreedy) {
    for (int i : order) any |= resume(b.fibers[size_t(i)]);
    return any;
  }
  int warps = (b.threads + 31) / 32;
  for (int k = 0; k < warps; k++) {
    int first = int((unsigned(k) + schedule - kGreedy) % unsigned(warps)) * 32, last = std::min(b.threads, first + 32);
    for (bool more = true; more; any |= more) {
      more = false;
      for (int i = first; i < last; i++) more |= resume(b.fibers[size_t(i)]);
    }
  }
  return any;
}

std::vector<int> thread_order() {
  std::vector<int> order(size_t(b.threads));
  for (int i = 0; i < b.threads; i++) order[size_t(i)] = i;
  if (schedule == 1) std::reverse(order.begin(), order.end());
  if (schedule > 1 && schedule < kGreedy) {
    std::mt19937 random(schedule + here.block.x * 7919 + here.block.y * 104729 + here.block.z);
    std::shuffle(order.begin(), order.end(), random);
  }
  return order;
}

void run_block() {
  int warps = (b.threads + 31) / 32;
  if (int(b.fibers.size()) < b.threads) b.fibers.resize(size_t(b.threads));
  if (int(b.warps.size()) < warps) b.warps.resize(size_t(warps));
  for (int i = 0; i < warps; i++) {
    b.warps[size_t(i)].arrived = 0;
    b.warps[size_t(i)].alive = std::min(32, b.threads - i * 32);
  }
  for (int i = 0; i < b.threads; i++) start(b.fibers[size_t(i)], i);
  b.arrived = 0;
  b.alive = b.threads;
  b.host_sanitizer = __tsan_get_current_fiber();
  std::fill(b.shared, b.shared + b.shared_bytes, char(0xff));  // NaN in bf16 and f32
  __tsan_release(&b.begun);
  const std::vector<int> order = thread_order();
  while (b.alive) {
    if (sweep(order)) continue;
    for (Fiber& f : b.fibers)
      if (f.state == kAtBarrier || f.state == kInCollective || f.state == kPolling) b.running = &f;
    die("deadlock: not all threads reach the same barrier or collective");
  }
  __tsan_acquire(&b.ended);
}

}  // namespace

void die(const char* what) {
  std::fprintf(stderr, "[cuda emulation] %s (block %u,%u,%u, thread %d, last barrier at line %d)\n", what, here.block.x,
               here.block.y, here.block.z, b.running ? b.running->number : -1, b.running ? b.running->line : -1);
  std::abort();
}

void set_schedule(unsigned seed) { schedule = seed; }

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  launches++;
  b.threads = int(block.x * block.y * block.z);
  if (b.threads < 1 || b.threads > 1024) die("launch: expected 1 to 1024 threads in a block");
  if (grid.y > 65535 || grid.z > 65535) die("launch: expected at most 65535 blocks in y and z");
  if (shared_bytes > (227 << 10)) die("launch: expected at most 227 KB of shared memory");
  if (b.shared_bytes != shared_bytes) {  // of exactly this size, so that AddressSanitizer sees its end
    std::free(b.shared);
    void* p = nullptr;
    if (shared_bytes && posix_memalign(&p, 1024, shared_bytes)) die("out of memory");
    b.shared = static_cast<char*>(p);
    b.shared_bytes = shared_bytes;
  }
  here.shared = b.shared;
  here.grid_dim = grid;
  here.block_dim = block;
  b.body = &body;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        here.block = dim3(x, y, z);
        run_block();
      }
  b.running = nullptr;
}

void wait_block(int line) {
  Fiber& f = *b.running;
  f.line = line;
  if (b.alive != b.threads) die("__syncthreads after a thread of the block has left");
  char* sync = &b.sync[b.round & 1];
  __tsan_release(sync);
  f.state = kAtBarrier;
  f.waits_for = b.round;
  if (++b.arrived == b.alive) {
    b.arrived = 0;
    b.round++;
    f.state = kReady;
  } else {
    pause();
  }
  __tsan_acquire(sync);
}

void wait_warp() {
  char* sync = &warp_of(*b.running).sync[warp_of(*b.running).round & 1];
  __tsan_release(sync);
  collective("bar.warp", ~0u, nullptr, 0, nullptr, 0, [](const Words*, Words*, const void*) {}, nullptr);
  __tsan_acquire(sync);
}

namespace {
struct Barrier {  // arrivals of each phase, those and the bytes the running phase waits for, its parity
  uint16_t arrivals, due;
  int32_t bytes : 31;
  uint32_t parity : 1;
};
static_assert(sizeof(Barrier) == sizeof(uint64_t), "an mbarrier has 8 bytes");
void barrier_change(uint64_t* barrier, int arrivals, int bytes) {
  __tsan_release(barrier);
  Barrier x;
  std::memcpy(&x, barrier, sizeof x);
  if (x.due < arrivals) die("mbarrier: more arrivals than it was made for");
  x.due = uint16_t(x.due - arrivals);
  x.bytes += bytes;
  if (x.due == 0 && x.bytes == 0) {
    x.due = x.arrivals;
    x.parity ^= 1;
  }
  std::memcpy(barrier, &x, sizeof x);
}
}  // namespace
void barrier_init(uint64_t* barrier, int arrivals) {
  const Barrier x{uint16_t(arrivals), uint16_t(arrivals), 0, 0};
  std::memcpy(barrier, &x, sizeof x);
}
void barrier_arrive(uint64_t* barrier, int bytes) { barrier_change(barrier, 1, bytes); }
void barrier_bytes(uint64_t* barrier, int bytes) { barrier_change(barrier, 0, -bytes); }
void barrier_wait(uint64_t* barrier, int parity) {
  for (;;) {
    Barrier x;
    std::memcpy(&x, barrier, sizeof x);
    if (int(x.parity) != parity) break;
    b.running->state = kPolling;
    pause();
  }
  __tsan_acquire(barrier);
}

void collective(const char* what, unsigned mask, const void* in, int in_words, void* out, int out_words,
                Exchange exchange, const void* argument) {
  Fiber& f = *b.running;
  Warp& w = warp_of(f);
  const int side = int(w.round & 1), lane = f.number % 32;
  if (mask != ~0u) die("a collective whose mask is not the whole warp");
  if (w.arrived == 0) {
    std::memset(w.in[side], 0xff, sizeof w.in[side]);
    w.what[side] = what;
  } else if (std::strcmp(w.what[side], what)) {
    die("lanes of a warp meet in different collectives");
  }
  for (int i = 0; i < in_words; i++) w.in[side][lane][i] = static_cast<const uint32_t*>(in)[i];
  f.waits_for = w.round;
  if (++w.arrived == w.alive) {
    w.arrived = 0;
    ignore_begin();
    exchange(w.in[side], w.out[side], argument);
    ignore_end();
    w.round++;
  } else {
    f.state = kInCollective;
    pause();
  }
  for (int i = 0; i < out_words; i++) static_cast<uint32_t*>(out)[i] = w.out[side][lane][i];
}

void copy_queue(Copy copy) { b.running->open.push_back(copy); }
void copy_commit() {
  b.running->groups.push_back(std::move(b.running->open));
  b.running->open.clear();
}
bool copy_next(int pending, Copy* out) {
  Fiber& f = *b.running;
  while (int(f.groups.size()) > pending) {
    if (f.landed < f.groups.front().size()) {
      *out = f.groups.front()[f.landed++];
      return true;
    }
    f.groups.erase(f.groups.begin());
    f.landed = 0;
  }
  return false;
}

}  // namespace shim
