// Matrix product: B and A are packed block by block into panels (transposition and conversion happen there), the micro
// kernel runs over tiles of C shared out to the pool, the epilogue runs on a tile while it is in cache.
#include "tile.h"

namespace AG_LEVEL {
namespace {

constexpr int64_t kKC = 384;   // depth of a block: a B panel stays in L1
constexpr int64_t kNC = 2048;  // columns of B packed at a time
constexpr int64_t kTileN = 256;

template <class C>
constexpr int64_t kTileM = kMR<C> * (64 / kMR<C> + 1);  // rows of a task
template <class C>
constexpr int64_t kMC = kTileM<C> * 16;  // rows of A packed at a time

// Sums between blocks of k live in C itself where its type and layout allow, else in scratch.
bool sums_in_c(const AgGemm* g) { return g->dt_c != AG_BF16 && !g->c_rows; }
bool tiny(const AgGemm* g) { return g->m * g->n * g->k < 64 * 64 * 64; }
// Decode: a few rows against a big matrix read once, without packing.
bool skinny(const AgGemm* g) { return g->m <= 4 && g->trans_b && !g->trans_a && !g->c_rows && g->n >= 64 && g->b; }

template <class C>
struct Plan {
  int64_t kc, nc, mc;
  int64_t b_elements, a_elements, sum_elements;
  explicit Plan(const AgGemm* g) {
    int64_t blocks = div_up(max_of(g->k, 1), kKC);
    kc = div_up(max_of(g->k, 1), blocks);
    nc = min_of(g->n, kNC);
    mc = min_of(g->m, kMC<C>);
    b_elements = panel_b_elements<C>(nc, kc);
    a_elements = panel_a_elements<C>(mc, kc);
    sum_elements = blocks > 1 && !sums_in_c(g) ? g->m * g->n : 0;
  }
  int64_t bytes() const {
    return arena_bytes(b_elements, sizeof(C)) + arena_bytes(a_elements, sizeof(C)) + arena_bytes(sum_elements, sizeof(C));
  }
};

template <class F>
void chunks(bool inline_only, int64_t n, const F& f) {
  if (inline_only)
    for (int64_t i = 0; i < n; i++) f(i);
  else
    parallel_for(n, f);
}

// Writes finished sums t [rows, cols] (leading dimension ldt) to rows i0.., columns j0.. of C.
template <class S, class D, class C>
void epilogue(const AgGemm* g, const C* t, int64_t ldt, int64_t i0, int64_t j0, int64_t rows, int64_t cols) {
  constexpr int W = kWidth<C>;
  const S* bias = static_cast<const S*>(g->bias);
  for (int64_t r = 0; r < rows; r++) {
    int64_t row = g->c_rows ? g->c_rows[i0 + r] : i0 + r;
    D* c = static_cast<D*>(g->c) + row * g->ldc + j0;
    D* pre = g->pre ? static_cast<D*>(g->pre) + (i0 + r) * g->n + j0 : nullptr;
    for (int64_t q = 0; q < cols; q += W) {
      int64_t n = min_of(W, cols - q);
      bool whole = n == W;
      Vec<C> v = whole ? load(t + r * ldt + q) : load_n(t + r * ldt + q, n);
      if (g->accumulate) v += whole ? load(c + q) : load_n(c + q, n);
      if (bias) v += whole ? load(bias + j0 + q) : load_n(bias + j0 + q, n);
      if (pre) {
        whole ? store(pre + q, v) : store_n(pre + q, v, n);
        if (sizeof(D) < sizeof(C)) v = whole ? load(pre + q) : load_n(pre + q, n);  // backward sees the rounded value
      }
      if (g->act != AG_NONE) v = activate(g->act, v, Vec<C>{});
      whole ? store(c + q, v) : store_n(c + q, v, n);
    }
  }
}

// One task: rows i0.. of the packed A block, columns j0.. of the packed B block, depth kc.
template <class S, class D, class C>
void compute_tile(const AgGemm* g, const C* a, const C* b, C* sums, int64_t kc, bool first, bool last, int64_t i0, int64_t j0,
                  int64_t rows, int64_t cols) {
  constexpr int MR = kMR<C>, NR = kNR<C>;
  alignas(64) C t[MR * NR];
  bool in_c = sums_in_c(g);
  bool plain = in_c && sizeof(D) == sizeof(C) && (!last || (!g->bias && g->act == AG_NONE && !g->pre));
  C* base = in_c ? reinterpret_cast<C*>(g->c) : sums;
  int64_t ld = in_c ? g->ldc : g->n;
  for (int64_t j = 0; j < cols; j += NR)
    for (int64_t i = 0; i < rows; i += MR) {
      int64_t m = min_of(MR, rows - i), n = min_of(NR, cols - j);
      const C *pa = a + i * kc, *pb = b + j * kc;
      C* home = base ? base + (i0 + i) * ld + j0 + j : nullptr;
      bool add = !first || (in_c && g->accumulate && first);
      if (plain && m == MR && n == NR) {
        micro<C>(kc, pa, pb, home, ld, add);
        continue;
      }
      micro<C>(kc, pa, pb, t, NR, false);
      bool carry = plain ? add : !first;  // what earlier blocks of k left
      if (carry)
        for (int64_t r = 0; r < m; r++)
          for (int64_t q = 0; q < n; q++) t[r * NR + q] += home[r * ld + q];
      if (plain || !last)
        for (int64_t r = 0; r < m; r++) memcpy(home + r * ld, t + r * NR, size_t(n) * sizeof(C));
      else
        epilogue<S, D, C>(g, t, NR, i0 + i, j0 + j, m, n);
    }
}

template <class S, class D>
void gemm_blocks(AgCtx* ctx, const AgGemm* g) {
  typedef Acc<S> C;
  Plan<C> plan(g);
  Arena arena(ctx->workspace);
  C *pb = arena.take<C>(plan.b_elements), *pa = arena.take<C>(plan.a_elements), *sums = arena.take<C>(plan.sum_elements);
  const S *A = static_cast<const S*>(g->a), *B = static_cast<const S*>(g->b);
  bool alone = tiny(g);
  int64_t k = max_of(g->k, 1);
  for (int64_t jc = 0; jc < g->n; jc += plan.nc) {
    int64_t nc = min_of(plan.nc, g->n - jc);
    for (int64_t pc = 0; pc < k; pc += plan.kc) {
      int64_t kc = min_of(plan.kc, g->k - pc);
      bool first = pc == 0, last = pc + plan.kc >= k;
      chunks(alone, div_up(nc, kNR<C>), [&](int64_t p) {
        int64_t j = p * kNR<C>;
        const S* from = g->trans_b ? B + (jc + j) * g->ldb + pc : B + pc * g->ldb + jc + j;
        pack_panel<kNR<C>>(g->trans_b, from, g->ldb, min_of(kNR<C>, nc - j), kc, pb + j * kc);
      });
      for (int64_t ic = 0; ic < g->m; ic += plan.mc) {
        int64_t mc = min_of(plan.mc, g->m - ic);
        chunks(alone, div_up(mc, kMR<C>), [&](int64_t p) {
          int64_t i = p * kMR<C>;
          const S* from = g->trans_a ? A + pc * g->lda + ic + i : A + (ic + i) * g->lda + pc;
          pack_panel<kMR<C>>(!g->trans_a, from, g->lda, min_of(kMR<C>, mc - i), kc, pa + i * kc);
        });
        int64_t tiles_m = div_up(mc, kTileM<C>), tiles_n = div_up(nc, kTileN);
        chunks(alone, tiles_m * tiles_n, [&](int64_t task) {
          int64_t i = task / tiles_n * kTileM<C>, j = task % tiles_n * kTileN;
          compute_tile<S, D, C>(g, pa + i * kc, pb + j * kc, sums, kc, first, last, ic + i, jc + j, min_of(kTileM<C>, mc - i),
                                min_of(kTileN, nc - j));
        });
      }
    }
  }
}

// Rows of A against rows of B: dot products, B read once from memory.
template <class S, class D>
void gemm_skinny(const AgGemm* g) {
  typedef Acc<S> C;
  constexpr int W = kWidth<C>;
  const S *A = static_cast<const S*>(g->a), *B = static_cast<const S*>(g->b);
  parallel_range(g->n, 32, [&](int64_t lo, int64_t hi) {
    C t[4 * 32];
    for (int64_t j = lo; j < hi; j++) {
      Vec<C> s[4][2] = {};
      const S* b = B + j * g->ldb;
      int64_t i = 0;
      for (; i + 2 * W <= g->k; i += 2 * W) {
        Vec<C> b0 = load(b + i), b1 = load(b + i + W);
        for (int64_t r = 0; r < g->m; r++) {
          s[r][0] += load(A + r * g->lda + i) * b0;
          s[r][1] += load(A + r * g->lda + i + W) * b1;
        }
      }
      for (; i < g->k; i += W) {
        int64_t n = min_of(W, g->k - i);
        Vec<C> b0 = load_n(b + i, n);
        for (int64_t r = 0; r < g->m; r++) s[r][0] += load_n(A + r * g->lda + i, n) * b0;
      }
      for (int64_t r = 0; r < g->m; r++) t[r * 32 + j - lo] = lane_sum(s[r][0] + s[r][1]);
    }
    epilogue<S, D, C>(g, t, 32, 0, lo, g->m, hi - lo);
  });
}

template <class S, class D>
void gemm_any(AgCtx* ctx, const AgGemm* g) {
  if (g->m == 0 || g->n == 0) return;
  if (skinny(g)) gemm_skinny<S, D>(g);
  else gemm_blocks<S, D>(ctx, g);
}

}  // namespace

int64_t gemm_workspace(const AgGemm* g) {
  if (skinny(g)) return 0;
  return g->dt == AG_F64 ? Plan<double>(g).bytes() : Plan<float>(g).bytes();
}

AgStatus gemm(AgCtx* ctx, const AgGemm* g) {
  bool to_f64 = g->dt_c == AG_F64;
  if ((g->dt == AG_F64) != to_f64 || g->dt > AG_F64 || g->dt_c > AG_F64 || (g->dt == AG_F32 && g->dt_c == AG_BF16)) {
    snprintf(ctx->error, sizeof ctx->error, "gemm: dtype %d to %d is not available", int(g->dt), int(g->dt_c));
    return AG_INVALID;
  }
  if (g->dt == AG_F64) gemm_any<double, double>(ctx, g);
  else if (g->dt == AG_F32) gemm_any<float, float>(ctx, g);
  else if (g->dt_c == AG_F32) gemm_any<bf16, float>(ctx, g);
  else gemm_any<bf16, bf16>(ctx, g);
  return AG_OK;
}

// Packing ahead of time brings nothing at these levels yet.
int64_t pack_bytes(const AgPack*) { return 0; }
AgStatus pack(AgCtx* ctx, const AgPack*) {
  snprintf(ctx->error, sizeof ctx->error, "pack: this level keeps weights as they are");
  return AG_UNSUPPORTED;
}

}  // namespace AG_LEVEL
