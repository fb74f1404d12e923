// What a benchmark needs: timing, the machine's measured peaks, and a table with a JSON line.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../cpu/pool.h"

namespace bench {

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Timing {
  double median, spread;  // seconds; (90th - 10th percentile) / median
};

// Two runs to warm up, then at least 7 and about 0.4 s of them.
inline Timing measure(const std::function<void()>& f) {
  f();
  f();
  std::vector<double> t;
  for (double start = now(); t.size() < 7 || (now() - start < 0.4 && t.size() < 500);) {
    double a = now();
    f();
    t.push_back(now() - a);
  }
  std::sort(t.begin(), t.end());
  double median = t[t.size() / 2];
  return {median, (t[t.size() * 9 / 10] - t[t.size() / 10]) / median};
}

// ---- peaks of this machine, all threads -------------------------------------------------------------
// Sixteen chains of multiply-add on vectors: more than the latency of any CPU needs. Compiled for what the CPU has.
typedef float Lanes __attribute__((vector_size(64)));
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "arch=haswell", "default")))
#endif
inline float multiply_add(int64_t rounds) {
  Lanes a[16];
  for (int i = 0; i < 16; i++) a[i] = Lanes{} + float(i);
  const Lanes x = Lanes{} + 0.999f, y = Lanes{} + 0.001f;
  for (int64_t r = 0; r < rounds; r++)
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = a[i] * x + y;
  float sum = 0;
  for (int i = 0; i < 16; i++) sum += a[i][0];
  return sum;
}

// f32 operations a second
inline double peak_flops() {
  constexpr int64_t kRounds = 200000;
  [[maybe_unused]] static volatile float sink;
  Timing t = measure([] {
    ag_parallel(ag_threads(), ag_threads(), [](void*, int64_t, int64_t) { sink = multiply_add(kRounds); }, nullptr);
  });
  return double(ag_threads()) * 2 * 16 * 16 * kRounds / t.median;
}

// bytes read and written a second by a copy of 256 MB
inline double peak_bytes() {
  struct Copy {
    std::vector<char> from, to;
  } copy{std::vector<char>(size_t(1) << 28, 1), std::vector<char>(size_t(1) << 28, 2)};
  Timing t = measure([&] {
    ag_parallel(
        64, ag_threads(),
        [](void* p, int64_t i, int64_t) {
          Copy* c = static_cast<Copy*>(p);
          size_t part = c->from.size() / 64;
          std::memcpy(c->to.data() + size_t(i) * part, c->from.data() + size_t(i) * part, part);
        },
        &copy);
  });
  return 2.0 * double(copy.from.size()) / t.median;
}

// ---- the table --------------------------------------------------------------------------------------
struct Options {
  std::string filter, json;
  int threads = 0;
};

inline Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; i++) {
    std::string key = argv[i];
    if (i + 1 == argc || (key != "--filter" && key != "--threads" && key != "--json")) {
      std::fprintf(stderr, "bench: expected --filter NAME, --threads N, --json FILE, got %s\n", argv[i]);
      std::exit(2);
    }
    std::string value = argv[++i];
    if (key == "--filter") o.filter = value;
    if (key == "--json") o.json = value;
    if (key == "--threads" && (o.threads = std::atoi(value.c_str())) < 1) {
      std::fprintf(stderr, "bench: --threads: expected a number >= 1, got %s\n", value.c_str());
      std::exit(2);
    }
  }
  return o;
}

class Table {
 public:
  Table(const Options& o, double flops, double bytes) : o_(o), flops_(flops), bytes_(bytes) {
    std::printf("peaks: %.0f GFLOP/s of f32 multiply-add, %.1f GB/s copied\n", flops * 1e-9, bytes * 1e-9);
    std::printf("%-46s %10s %7s %10s %8s %8s\n", "", "ms", "spread", "GFLOP/s", "GB/s", "of peak");
  }
  bool wants(const std::string& name) const { return name.find(o_.filter) != std::string::npos; }
  // `flops` and `bytes` of one run: what the work needs, not what an implementation does. One of them may be 0.
  void row(const std::string& name, double flops, double bytes, const std::function<void()>& run) {
    if (!wants(name)) return;
    Timing t = measure(run);
    double share = std::max(flops / t.median / flops_, bytes / t.median / bytes_);
    std::printf("%-46s %10.3f %6.0f%% %10.1f %8.1f %7.0f%%\n", name.c_str(), t.median * 1e3, 100 * t.spread,
                flops / t.median * 1e-9, bytes / t.median * 1e-9, 100 * share);
    std::fflush(stdout);
    char line[512];
    std::snprintf(line, sizeof line,
                  "{\"name\": \"%s\", \"ms\": %.5f, \"spread\": %.4f, \"gflops\": %.2f, \"gbs\": %.2f, \"peak\": %.4f}",
                  name.c_str(), t.median * 1e3, t.spread, flops / t.median * 1e-9, bytes / t.median * 1e-9, share);
    rows_ += (rows_.empty() ? "" : ", ") + std::string(line);
  }
  void finish(const char* level) const {
    char head[256];
    std::snprintf(head, sizeof head,
                  "{\"level\": \"%s\", \"threads\": %d, \"peakGflops\": %.1f, \"peakGbs\": %.2f, \"rows\": [", level,
                  ag_threads(), flops_ * 1e-9, bytes_ * 1e-9);
    std::string all = head + rows_ + "]}";
    std::printf("%s\n", all.c_str());
    if (o_.json.empty()) return;
    FILE* f = std::fopen(o_.json.c_str(), "w");
    if (!f || std::fputs((all + "\n").c_str(), f) < 0 || std::fclose(f) != 0) {
      std::fprintf(stderr, "bench: %s cannot be written\n", o_.json.c_str());
      std::exit(1);
    }
  }

 private:
  Options o_;
  double flops_, bytes_;
  std::string rows_;
};

}  // namespace bench
