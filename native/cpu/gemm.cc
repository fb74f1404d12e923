// Matrix product. One operand is packed whole and shared, the tasks cut the other side of C and pack their share of the
// other operand themselves, so that it is hot when the micro kernel reads it. Transposition and conversion from bf16
// (or, in dot.h, the pairing of bf16) happen while packing. Depth is cut into blocks; sums between blocks stay in C or
// in a task's own scratch, never rounded. Few rows against an unpacked matrix take a path that reads it once, as it
// lies.
#include "functions.h"
#include "microkernel.h"

namespace AG_LEVEL {
namespace {

#if defined(AG_LEVEL_PORTABLE)
constexpr int64_t kKC = 128;  // steps of a block; without fused multiply-add shorter sums keep the error down
#elif defined(AG_BF16_DOT)
constexpr int64_t kKC = 640;
#else
constexpr int64_t kKC = 384;
#endif
constexpr int64_t kSharedRows = 560;                   // at most so many rows of A are shared; beyond that B is
constexpr int64_t kSharedElements = int64_t(2) << 20;  // of B: they stay in the last cache
constexpr int64_t kNarrow = 8;                         // rows that are not worth packing B for

// Between blocks of k the sums live in C itself where its type and layout allow it.
bool sums_in_c(const AgGemm* g) { return g->dt_c != AG_BF16 && !g->c_rows; }
bool tiny(const AgGemm* g) { return double(g->m) * double(g->n) * double(g->k) < 64.0 * 64 * 128; }
// A few rows against a matrix that is read once, as it lies: dot products with its rows, or sums of them.
// Packed or not: the results are the same.
bool skinny(const AgGemm* g) { return g->m <= kNarrow && g->trans_b && !g->trans_a && g->b; }
bool thin(const AgGemm* g) { return g->m <= kNarrow && !g->trans_b && g->b; }

// How a product is cut: by shape and level only.
template <class S>
struct Plan {
  typedef Acc<S> C;
  bool share_a;
  int64_t steps, blocks, kc;  // of the depth; blocks, and steps of one
  int64_t chunk;              // columns of B packed at a time when B is shared
  int64_t task, tasks;        // rows (columns when A is shared) of a task; tasks of a chunk
  int64_t shared, own, sums;  // slots: the shared operand; a task's panels and sums

  explicit Plan(const AgGemm* g) {
    constexpr int64_t MR = kMR<C>, NR = kNR<C>;
    steps = steps_of<S>(g->k);
    int64_t k = max_of(steps, 1);
    blocks = div_up(k, kKC);
    kc = blocks == 1 ? k : round_up(div_up(k, blocks), 16);
    blocks = div_up(k, kc);
    share_a = g->m <= kSharedRows && g->m < g->n;
    bool pack_b = !g->b_packed;
    if (share_a) {
      chunk = g->n;
      task = NR * max_of(1, min_of(4, div_up(g->n, NR) / 32));
      tasks = div_up(g->n, task);
      shared = round_up(g->m, MR) * k;
      own = pack_b ? NR * kc : 0;  // a panel at a time
      sums = round_up(g->m, MR) * task;
    } else {
      chunk = round_up(max_of(512, min_of(2048, kSharedElements / k)), NR);
      chunk = min_of(chunk, round_up(g->n, NR));
      task = MR * max_of(1, min_of(5, div_up(g->m, MR) / 24));
      tasks = div_up(g->m, task);
      shared = pack_b ? chunk * k : 0;
      own = task * kc;
      sums = task * chunk;
    }
    if (sums_in_c(g) || blocks == 1) sums = 0;
  }
  int64_t shared_bytes() const { return arena_bytes(shared, sizeof(C)); }
  int64_t own_bytes() const { return arena_bytes(own, sizeof(C)) + arena_bytes(sums, sizeof(C)); }
  int64_t bytes() const { return shared_bytes() + own_bytes() * max_of(1, min_of(ag_threads(), tasks)); }
};

template <class F>
void spread(bool here, int64_t n, int64_t workers, const F& f) {
  if (here)
    for (int64_t i = 0; i < n; i++) f(i, 0);
  else
    parallel_workers(n, workers, f);
}

// Writes finished sums t [rows, cols] (leading dimension ldt) to rows i0.., columns j0.. of C. add: C has more to add.
template <class S, class D, class C>
void epilogue(const AgGemm* g, const C* t, int64_t ldt, int64_t i0, int64_t j0, int64_t rows, int64_t cols, bool add) {
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
      if (add) v += whole ? load(c + q) : load_n(c + q, n);
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

// A panel of columns j.. of B, n x k, and `steps` steps from step pc on.
template <class S>
void pack_b(const void* matrix, int64_t ldb, bool transposed, int64_t n, int64_t depth, int64_t j, int64_t pc,
            int64_t steps, Acc<S>* to) {
  const S* b = static_cast<const S*>(matrix);
  int64_t count = min_of(kNR<Acc<S>>, n - j), k0 = pc * kStep<S>, k = min_of(steps * kStep<S>, depth - k0);
  if (transposed)
    b_of_rows<S>([&](int64_t c) { return b + (j + c) * ldb + k0; }, count, k, to);
  else
    b_of_columns<S>([&](int64_t kk) { return b + (k0 + kk) * ldb + j; }, count, k, to);
}

// S: storage of A and B, D: of C, P: a slot of the packed B.
template <class S, class D, class P>
struct Product {
  typedef Acc<S> C;
  static constexpr int64_t MR = kMR<C>, NR = kNR<C>;
  const AgGemm* g;
  Plan<S> plan;
  C* shared;
  char* own;
  int64_t workers;
  bool here, in_c, epilogue_wanted;

  Product(AgCtx* ctx, const AgGemm* args) : g(args), plan(args) {
    shared = static_cast<C*>(ctx->workspace);
    own = static_cast<char*>(ctx->workspace) + plan.shared_bytes();
    int64_t left = ctx->workspace_bytes - plan.shared_bytes(), per = plan.own_bytes();
    workers = per ? max_of(1, left / per) : plan.tasks;
    here = tiny(g);
    in_c = sums_in_c(g);
    epilogue_wanted = g->bias || g->pre || g->act != AG_NONE;
  }

  // A panel of rows i.. (columns j..) and `steps` steps from step pc on.
  void pack_a_panel(int64_t i, int64_t pc, int64_t steps, C* to) const {
    const S* a = static_cast<const S*>(g->a);
    int64_t count = min_of(MR, g->m - i), k0 = pc * kStep<S>, k = min_of(steps * kStep<S>, g->k - k0);
    if (g->trans_a)
      a_of_columns<S>([&](int64_t kk) { return a + (k0 + kk) * g->lda + i; }, count, k, to);
    else
      a_of_rows<S>([&](int64_t r) { return a + (i + r) * g->lda + k0; }, count, k, to);
  }
  void pack_b_panel(int64_t j, int64_t pc, int64_t steps, C* to) const {
    pack_b<S>(g->b, g->ldb, g->trans_b, g->n, g->k, j, pc, steps, to);
  }

  void pack_shared(int64_t jc, int64_t nc) {
    if (plan.shared == 0) return;
    bool a = plan.share_a;
    int64_t width = a ? MR : NR, panels = div_up(a ? g->m : nc, width);
    spread(here, panels * plan.blocks, 1 << 20, [&](int64_t i, int64_t) {
      int64_t panel = i / plan.blocks, pc = i % plan.blocks * plan.kc, kc = min_of(plan.kc, plan.steps - pc);
      if (kc <= 0) return;
      C* to = shared + pc * panels * width + panel * width * kc;
      a ? pack_a_panel(panel * MR, pc, kc, to) : pack_b_panel(jc + panel * NR, pc, kc, to);
    });
  }

  // One tile of C: m x n at (i, j), depth kc, the block of depth first and/or last of all. sums: its place in scratch.
  template <class B>
  void tile(int64_t i, int64_t j, int64_t m, int64_t n, int64_t kc, const C* a, const B* b, C* sums, int64_t lds,
            bool first, bool last) const {
    alignas(64) C t[MR * NR];
    bool finish = last && (epilogue_wanted || !in_c);
    bool add = !first || (in_c && g->accumulate);
    if (!in_c) {
      C* home = sums ? sums : t;
      int64_t ld = sums ? lds : NR;
      micro_edge<C, B>(m, kc, a, MR, b, NR, home, ld, !first);
      if (last) epilogue<S, D, C>(g, home, ld, i, j, m, n, g->accumulate);
      return;
    }
    C* home = reinterpret_cast<C*>(g->c) + i * g->ldc + j;
    if (n == NR && m == rows_computed<C>(m)) {
      micro_edge<C, B>(m, kc, a, MR, b, NR, home, g->ldc, add);
      if (finish) epilogue<S, D, C>(g, home, g->ldc, i, j, m, n, false);
      return;
    }
    micro_edge<C, B>(m, kc, a, MR, b, NR, t, NR, false);
    if (finish) return finish_edge(t, i, j, m, n, add);
    for (int64_t r = 0; r < m; r++)
      for (int64_t q = 0; q < n; q++) home[r * g->ldc + q] = add ? home[r * g->ldc + q] + t[r * NR + q] : t[r * NR + q];
  }
  void finish_edge(const C* t, int64_t i, int64_t j, int64_t m, int64_t n, bool add) const {
    epilogue<S, D, C>(g, t, NR, i, j, m, n, add);
  }

  // Rows i0.. and columns j0.. of C over the whole depth. jc: where the shared columns begin.
  void task(int64_t i0, int64_t rows, int64_t j0, int64_t cols, int64_t jc, int64_t nc, char* scratch) const {
    Tiles tiles_of_thread;
    Arena arena(scratch);
    C *mine = arena.take<C>(plan.own), *sums = plan.sums ? arena.take<C>(plan.sums) : nullptr;
    int64_t padded_m = round_up(g->m, MR), padded_n = round_up(g->b_packed ? g->n : nc, NR), lds = round_up(cols, NR);
    for (int64_t pc = 0; pc < plan.blocks * plan.kc; pc += plan.kc) {
      int64_t kc = max_of(0, min_of(plan.kc, plan.steps - pc));
      bool first = pc == 0, last = pc + plan.kc >= plan.steps;
      const C* a = plan.share_a ? shared + pc * padded_m : mine;
      if (!plan.share_a)
        for (int64_t i = 0; i < rows; i += MR) pack_a_panel(i0 + i, pc, kc, mine + i * kc);
      for (int64_t j = 0; j < cols; j += NR) {
        int64_t n = min_of(NR, cols - j);
        auto column = [&](auto* b) {
          for (int64_t i = 0; i < rows; i += MR)
            tile(i0 + i, j0 + j, min_of(MR, rows - i), n, kc, a + i * kc, b, sums ? sums + i * lds + j : nullptr, lds,
                 first, last);
        };
        if (g->b_packed) {
          column(static_cast<const P*>(g->b_packed) + pc * padded_n + (j0 + j) * kc);
        } else if (plan.share_a) {
          pack_b_panel(j0 + j, pc, kc, mine);
          column(reinterpret_cast<const Slot<S>*>(mine));
        } else {
          column(reinterpret_cast<const Slot<S>*>(shared + pc * padded_n + (j0 + j - jc) * kc));
        }
      }
    }
  }

  void run() {
    for (int64_t jc = 0; jc < g->n; jc += plan.chunk) {
      int64_t nc = min_of(plan.chunk, g->n - jc);
      pack_shared(jc, nc);
      spread(here, plan.tasks, workers, [&](int64_t i, int64_t worker) {
        int64_t at = i * plan.task;
        char* scratch = own + worker * plan.own_bytes();
        if (plan.share_a)
          task(0, g->m, at, min_of(plan.task, g->n - at), 0, g->n, scratch);
        else
          task(at, min_of(plan.task, g->m - at), jc, nc, jc, nc, scratch);
      });
    }
  }
};

// ---- few rows ---------------------------------------------------------------------------------------
// t[r*ldt + q] += <a[r], row q of b> for R rows of A and Q rows of B.
template <int R, int Q, class S>
__attribute__((noinline)) void dots(const S* const* a, const S* b, int64_t ldb, int64_t k, Acc<S>* t, int64_t ldt) {
  constexpr int W = kDotWidth<S>;
  Vec<Acc<S>> x[R][Q];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++) x[r][q] = Vec<Acc<S>>{};
  auto step = [&](int64_t i, auto get) __attribute__((always_inline)) {
    decltype(get(b)) y[Q];
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++) {
      y[q] = get(b + q * ldb + i);
      if (R > 2) __builtin_prefetch(b + (q + Q) * ldb + i);  // the rows that come next; else the hardware has them
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      auto v = get(a[r] + i);
#pragma GCC unroll 4
      for (int q = 0; q < Q; q++) dot_add(x[r][q], v, y[q]);
    }
  };
  int64_t i = 0;
  for (; i + W <= k; i += W) step(i, [](const S* p) __attribute__((always_inline)) { return dot_load(p); });
  if (i < k) step(i, [&](const S* p) __attribute__((always_inline)) { return dot_load_n(p, k - i); });
  for (int r = 0; r < R; r++)
    for (int q = 0; q < Q; q++) t[r * ldt + q] += sum_lanes(x[r][q]);
}

constexpr int64_t kSkinnyTask = 32;  // rows of B at a time

template <int R, class S, class D>
void skinny_rows(const AgGemm* g) {
  typedef Acc<S> C;
  constexpr int kRegisters = AG_VECTOR_BYTES == 64 ? 16 : 8, Q = kRegisters / R > 4 ? 4 : kRegisters / R;
  const S *A = static_cast<const S*>(g->a), *B = static_cast<const S*>(g->b);
  constexpr int64_t depth = 8192 / R;  // the rows of A stay in L1
  spread(tiny(g), div_up(g->n, kSkinnyTask), 1 << 20, [&](int64_t task, int64_t) {
    C t[R * kSkinnyTask] = {};
    int64_t j0 = task * kSkinnyTask, cols = min_of(kSkinnyTask, g->n - j0);
    for (int64_t k0 = 0; k0 < g->k; k0 += depth) {
      const S *rows[R], *b = B + j0 * g->ldb + k0;
      for (int r = 0; r < R; r++) rows[r] = A + min_of(r, g->m - 1) * g->lda + k0;  // a missing row repeats the last
      int64_t kn = min_of(depth, g->k - k0), j = 0;
      for (; j + Q <= cols; j += Q) dots<R, Q>(rows, b + j * g->ldb, g->ldb, kn, t + j, kSkinnyTask);
      for (; j < cols; j++) dots<R, 1>(rows, b + j * g->ldb, g->ldb, kn, t + j, kSkinnyTask);
    }
    epilogue<S, D, C>(g, t, kSkinnyTask, 0, j0, g->m, cols, g->accumulate);
  });
}

// t[r][q] += sum of a[r][i] * row i of B, for N rows of B. `ahead`: how far on the rows lie that come next. They are
// fetched by hand: each lies in a page of its own, where the hardware looks no further.
template <int R, int N, class S>
inline void add_rows(const Acc<S> (&a)[R][N], const S* b, int64_t ldb, int64_t ahead, int64_t cols, Acc<S>* t,
                     int64_t ldt) {
  typedef Acc<S> C;
  constexpr int W = kWidth<C>;
  auto add = [&](int64_t q, auto get) __attribute__((always_inline)) {
    Vec<C> v[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
      v[i] = get(b + i * ldb + q);
      __builtin_prefetch(b + i * ldb + q + ahead);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      Vec<C> s = load(t + r * ldt + q);
#pragma GCC unroll 4
      for (int i = 0; i < N; i++) s += a[r][i] * v[i];
      store(t + r * ldt + q, s);
    }
  };
  int64_t q = 0;
  for (; q + W <= cols; q += W) add(q, [](const S* p) __attribute__((always_inline)) { return load(p); });
  if (q < cols) add(q, [&](const S* p) __attribute__((always_inline)) { return load_n(p, cols - q); });
}

// Sums of the rows of B for R rows of A, a strip of columns at a time.
template <int R, class S, class D>
void thin_rows(const AgGemm* g) {
  typedef Acc<S> C;
  constexpr int64_t strip = 1024 / (R > 2 ? R / 2 : 1);
  constexpr int N = 4;
  const S *A = static_cast<const S*>(g->a), *B = static_cast<const S*>(g->b);
  auto a_at = [&](int64_t r, int64_t k) {
    return r < g->m ? C(to_acc(g->trans_a ? A[k * g->lda + r] : A[r * g->lda + k])) : C(0);
  };
  spread(tiny(g), div_up(g->n, strip), 1 << 20, [&](int64_t task, int64_t) {
    alignas(64) C t[R * strip];
    memset(t, 0, sizeof t);
    int64_t j0 = task * strip, cols = min_of(strip, g->n - j0), k = 0;
    for (; k + N <= g->k; k += N) {
      C a[R][N];
      for (int r = 0; r < R; r++)
        for (int i = 0; i < N; i++) a[r][i] = a_at(r, k + i);
      add_rows<R, N, S>(a, B + k * g->ldb + j0, g->ldb, k + 2 * N <= g->k ? N * g->ldb : 0, cols, t, strip);
    }
    for (; k < g->k; k++) {
      C a[R][1];
      for (int r = 0; r < R; r++) a[r][0] = a_at(r, k);
      add_rows<R, 1, S>(a, B + k * g->ldb + j0, g->ldb, 0, cols, t, strip);
    }
    epilogue<S, D, C>(g, t, strip, 0, j0, g->m, cols, g->accumulate);
  });
}

template <int R, class S, class D>
void few_rows(const AgGemm* g) {
  skinny(g) ? skinny_rows<R, S, D>(g) : thin_rows<R, S, D>(g);
}

template <class S, class D>
void gemm_any(AgCtx* ctx, const AgGemm* g) {
  if (g->m == 0 || g->n == 0) return;
  if (!skinny(g) && !thin(g)) {
    if (g->b_packed)
      Product<S, D, Blob<S>>(ctx, g).run();
    else
      Product<S, D, Slot<S>>(ctx, g).run();
  } else if (g->m == 1) {
    few_rows<1, S, D>(g);
  } else if (g->m == 2) {
    few_rows<2, S, D>(g);
  } else if (g->m <= 4) {
    few_rows<4, S, D>(g);
  } else {
    few_rows<8, S, D>(g);
  }
}

// The panels of `pack`: those of a product with any number of rows.
template <class S>
void pack_all(const AgPack* p) {
  constexpr int64_t NR = kNR<Acc<S>>;
  AgGemm g{};
  g.m = 1, g.n = p->n, g.k = p->k;
  Plan<S> plan(&g);
  parallel_for(div_up(p->n, NR), [&](int64_t panel) {
    int64_t j = panel * NR;
    for (int64_t pc = 0; pc < plan.steps; pc += plan.kc) {
      int64_t kc = min_of(plan.kc, plan.steps - pc);
      Blob<S>* to = static_cast<Blob<S>*>(p->blob) + pc * round_up(p->n, NR) + j * kc;
      if constexpr (sizeof(Blob<S>) == sizeof(Acc<S>)) {
        pack_b<S>(p->b, p->ldb, p->trans_b, p->n, p->k, j, pc, kc, reinterpret_cast<Acc<S>*>(to));
      } else {  // the weight's own type: half the bytes to read
        const S* b = static_cast<const S*>(p->b);
        for (int64_t kk = 0; kk < kc; kk++)
          for (int64_t i = 0; i < NR; i++) {
            const S* from = p->trans_b ? b + (j + i) * p->ldb + pc + kk : b + (pc + kk) * p->ldb + j + i;
            to[kk * NR + i] = j + i < p->n ? *from : S{};
          }
      }
    }
  });
}

}  // namespace

int64_t gemm_workspace(const AgGemm* g) {
  if (elsewhere(g->dt)) return other::gemm_workspace(g);
  if (g->m == 0 || g->n == 0 || skinny(g) || thin(g)) return 0;
  return with_here(g->dt, [&](auto tag) { return Plan<typename decltype(tag)::type>(g).bytes(); });
}

AgStatus gemm(AgCtx* ctx, const AgGemm* g) {
  bool to_f64 = g->dt_c == AG_F64;
  if ((g->dt == AG_F64) != to_f64 || g->dt > AG_F64 || g->dt_c > AG_F64 || (g->dt == AG_F32 && g->dt_c == AG_BF16)) {
    snprintf(ctx->error, sizeof ctx->error, "gemm: dtype %d to %d is not available", int(g->dt), int(g->dt_c));
    return AG_INVALID;
  }
  if (elsewhere(g->dt)) return other::gemm(ctx, g);
  with_here(g->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    if (sizeof(S) == 2 && g->dt_c == AG_F32)
      gemm_any<S, Acc<S>>(ctx, g);
    else
      gemm_any<S, S>(ctx, g);
    return 0;
  });
  return AG_OK;
}

int64_t pack_bytes(const AgPack* p) {
  if (elsewhere(p->dt)) return other::pack_bytes(p);
  return with_here(p->dt, [&](auto tag) {
    typedef typename decltype(tag)::type S;
    return steps_of<S>(p->k) * round_up(p->n, kNR<Acc<S>>) * int64_t(sizeof(Blob<S>));
  });
}
AgStatus pack(AgCtx* ctx, const AgPack* p) {
  if (p->dt > AG_F64) return bad_dtype(ctx, "pack", p->dt, "f32, bf16 or f64");
  if (elsewhere(p->dt)) return other::pack(ctx, p);
  with_here(p->dt, [&](auto tag) {
    pack_all<typename decltype(tag)::type>(p);
    return 0;
  });
  return AG_OK;
}

}  // namespace AG_LEVEL
