// Products of bf16 with AMX: tiles of 16 rows of 64 bytes, tdpbf16ps adds the product of a tile of A (16 rows, 32 k)
// and a tile of B (16 steps of a panel, 16 columns) to a tile of f32 sums. A step is a pair along k; k is filled up
// with zeros to whole tiles in both operands. A panel of A is cut into pieces of 16 steps, its 32 rows one after
// another.
//
// The instructions are written as assembly: no intrinsic says that a tile load reads memory, and gcc 12's
// _tile_loadconfig may lose the stores to its struct. A test build has C++ in their place (AG_AMX_EMULATED), so that
// all of this runs, under sanitizers too, on machines without the instructions.
#pragma once

namespace AG_LEVEL {
namespace {

// ---- tile instructions ------------------------------------------------------------------------------
struct alignas(64) TileConfig {
  uint8_t palette, start_row, zero[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "the layout ldtilecfg reads");
const TileConfig kTileConfig = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

#ifdef AG_AMX_EMULATED
struct TileState {
  TileConfig config;
  alignas(64) uint8_t tile[8][16][64];
};
thread_local TileState t_tiles;

// What the CPU answers with an exception.
inline void tile_require(bool ok) {
  if (!ok) __builtin_trap();
}
inline bool tile_ready(int t) {
  const TileConfig& c = t_tiles.config;
  return c.palette == 1 && c.rows[t] > 0 && c.rows[t] <= 16 && c.row_bytes[t] > 0 && c.row_bytes[t] <= 64;
}
inline void tile_configure(const TileConfig* c) {
  tile_require(c->palette == 1);
  for (int i = 0; i < 16; i++)
    tile_require(i < 8 ? c->rows[i] <= 16 && c->row_bytes[i] <= 64 : !c->rows[i] && !c->row_bytes[i]);
  memset(&t_tiles, 0, sizeof t_tiles);
  t_tiles.config = *c;
}
inline void tile_release() { memset(&t_tiles, 0, sizeof t_tiles); }
template <int t>
inline void tile_zero() {
  tile_require(tile_ready(t));
  memset(t_tiles.tile[t], 0, 1024);
}
template <int t>
inline void tile_load(const float* p, int64_t stride) {  // bytes, as for the instruction
  tile_zero<t>();
  for (int r = 0; r < t_tiles.config.rows[t]; r++)
    memcpy(t_tiles.tile[t][r], reinterpret_cast<const char*>(p) + r * stride, t_tiles.config.row_bytes[t]);
}
template <int t>
inline void tile_store(float* p, int64_t stride) {
  tile_require(tile_ready(t));
  for (int r = 0; r < t_tiles.config.rows[t]; r++)
    memcpy(reinterpret_cast<char*>(p) + r * stride, t_tiles.tile[t][r], t_tiles.config.row_bytes[t]);
}
inline float no_subnormal(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }
inline void tile_elements(int t, float (&to)[16][32]) {
  for (int r = 0; r < 16; r++)
    for (int i = 0; i < 32; i++) {
      bf16 h;
      memcpy(&h, t_tiles.tile[t][r] + 2 * i, 2);
      to[r][i] = no_subnormal(to_acc(h));
    }
}
// As the manual has it: the sums of the even and of the odd k of the tile are kept apart and added to C together.
template <int c, int a, int b>
inline void tile_dot() {
  const TileConfig& f = t_tiles.config;
  tile_require(tile_ready(a) && tile_ready(b) && tile_ready(c) && c != a && c != b && a != b);
  tile_require(f.rows[c] == f.rows[a] && f.row_bytes[c] == f.row_bytes[b] && f.row_bytes[a] == 4 * f.rows[b]);
  float x[16][32], y[16][32];
  tile_elements(a, x), tile_elements(b, y);
  for (int m = 0; m < f.rows[c]; m++)
    for (int n = 0; n < f.row_bytes[c] / 4; n++) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < f.rows[b]; k++) {
        even = no_subnormal(fmaf(x[m][2 * k], y[k][2 * n], even));
        odd = no_subnormal(fmaf(x[m][2 * k + 1], y[k][2 * n + 1], odd));
      }
      uint8_t* to = t_tiles.tile[c][m] + 4 * n;
      memcpy(&sum, to, 4);
      sum = no_subnormal(no_subnormal(sum) + no_subnormal(even + odd));
      memcpy(to, &sum, 4);
    }
}
#else
inline void tile_configure(const TileConfig* c) { asm volatile("ldtilecfg %0" ::"m"(*c) : "memory"); }
inline void tile_release() { asm volatile("tilerelease" ::: "memory"); }
template <int t>
inline __attribute__((always_inline)) void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(t));
}
template <int t>
inline __attribute__((always_inline)) void tile_load(const float* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
template <int t>
inline __attribute__((always_inline)) void tile_store(float* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
// tmm(c) += tmm(a) tmm(b); AT&T order has the destination last
template <int c, int a, int b>
inline __attribute__((always_inline)) void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
#endif

// The tiles of a thread while a task of the pool runs on it: switching threads is dearer while a tile is in use.
struct Tiles {
  Tiles() { tile_configure(&kTileConfig); }
  ~Tiles() { tile_release(); }
  Tiles(const Tiles&) = delete;
};

// ---- product ----------------------------------------------------------------------------------------
// Where the tiles of A lie, in slots: from row to row, from a tile to the one 16 rows below, and 16 steps further on.
struct TilesA {
  const float* p;
  int64_t row, below, along;
};

// c[16 or 32][32] = or += A B; rows > 16 takes two tiles of A. B is a packed panel.
inline __attribute__((noinline)) void multiply_tiles(int64_t rows, int64_t steps, TilesA a, const float* b, float* c,
                                                     int64_t ldc, bool add) {
  constexpr int64_t NR = kNR<float>, slot = sizeof(float);
  bool two = rows > 16;
  int64_t row = a.row * slot, out = ldc * slot;
  float* c2 = c + 16 * ldc;
  if (add) {
    tile_load<0>(c, out), tile_load<1>(c + 16, out);
    if (two) tile_load<2>(c2, out), tile_load<3>(c2 + 16, out);
  } else {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  }
  for (int64_t s = 0; s < steps; s += 16, a.p += a.along, b += 16 * NR) {
    tile_load<6>(b, NR * slot);
    tile_load<4>(a.p, row);
#pragma GCC unroll 32
    for (int i = 0; i < 32; i++) __builtin_prefetch(b + 32 * NR + i * 16);  // the tiles after the next
    tile_dot<0, 4, 6>();
    tile_load<7>(b + 16, NR * slot);
    tile_dot<1, 4, 7>();
    if (!two) continue;
    tile_load<5>(a.p + a.below, row);
    tile_dot<2, 5, 6>();
    tile_dot<3, 5, 7>();
  }
  tile_store<0>(c, out), tile_store<1>(c + 16, out);
  if (two) tile_store<2>(c2, out), tile_store<3>(c2 + 16, out);
}
// For packed operands.
template <class C, class B>
inline void micro_edge(int64_t rows, int64_t steps, const C* a, int64_t, const B* b, int64_t, C* c, int64_t ldc,
                       bool add) {
  multiply_tiles(rows, steps, TilesA{a, 16, 256, 512}, reinterpret_cast<const float*>(b), c, ldc, add);
}

// ---- packing ----------------------------------------------------------------------------------------
template <class S>
inline int64_t steps_of(int64_t k) {
  return round_up(div_up(k, 2), 16);
}
template <class S, class F>
inline void a_of_rows(const F& at, int64_t count, int64_t k, float* to) {
  int64_t steps = steps_of<S>(k);
  for (int64_t i = 0; i < kMR<float>; i++) {
    const bf16* row = i < count ? at(i) : nullptr;
    for (int64_t s = 0; s < steps; s += 16)
      store(to + s * kMR<float> + i * 16, row ? load_pairs(row + 2 * s, k - 2 * s) : vf{});
  }
}
template <class S, class F>
inline void a_of_columns(const F& at, int64_t count, int64_t k, float* to) {
  int64_t steps = steps_of<S>(k);
  for (int64_t s = 0; s < steps; s += 16)
    for (int64_t h = 0; h < kMR<float>; h += 16) {
      vf r[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; i++) {
        int64_t kk = 2 * (s + i);
        r[i] = kk < k && h < count ? interleave(at(kk) + h, kk + 1 < k ? at(kk + 1) + h : nullptr, count - h) : vf{};
      }
      transpose(r);
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; i++) store(to + s * kMR<float> + (h + i) * 16, r[i]);
    }
}
inline void fill_steps(int64_t k, float* to) {
  constexpr int64_t NR = kNR<float>;
  memset(to + div_up(k, 2) * NR, 0, size_t((steps_of<bf16>(k) - div_up(k, 2)) * NR) * sizeof(float));
}
template <class S, class F>
inline void b_of_rows(const F& at, int64_t count, int64_t k, float* to) {
  pairs_of_rows<kNR<float>>(at, count, k, to);
  fill_steps(k, to);
}
template <class S, class F>
inline void b_of_columns(const F& at, int64_t count, int64_t k, float* to) {
  pairs_of_columns<kNR<float>>(at, count, k, to);
  fill_steps(k, to);
}
// Transposes 16 rows of 16 slots where they lie, ld apart.
inline void transpose_block(float* p, int64_t ld) {
  vf r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = load(p + i * ld);
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) store(p + i * ld, r[i]);
}

}  // namespace
}  // namespace AG_LEVEL
