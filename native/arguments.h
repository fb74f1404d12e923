// The arguments of every kernel, and with them what it computes. Part of the contract: backend.h, which includes this,
// has the list of kernels and the table; nobody else includes it.
//
// Pointers are device memory, indices and offsets too. In host memory, and read before the call returns, are the
// argument structs and the lists of AgSumSquares.spans and AgAdamW.tensors. A kernel's gradient has a struct of its
// own, XxxGrad.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { AG_F32 = 0, AG_BF16 = 1, AG_F64 = 2, AG_I32 = 3, AG_I64 = 4 } AgDtype;

// "acc" below is the type sums are kept in: f64 for f64 tensors, f32 for f32 and bf16.

// Where a parameter gradient goes. p == NULL: not wanted. accumulate: add to what is there.
// The dtype is the buffer's own (f32 gradients of bf16 parameters are normal).
typedef struct {
  void* p;
  AgDtype dt;
  int32_t accumulate;
} AgGrad;

typedef enum { AG_NONE = 0, AG_GELU, AG_GELU_TANH, AG_QUICK_GELU, AG_SILU, AG_SCALE, AG_EXP } AgUnaryOp;
typedef enum { AG_ADD = 0, AG_SUB, AG_MUL } AgBinaryOp;

// ---- moving and filling -----------------------------------------------------------------------------
typedef struct {
  void* dst;
  AgDtype dt;
  int64_t n;
  double value;
} AgFill;

// Rows of bytes: concat, slice, broadcast of a row (src_stride 0). Regions do not overlap.
typedef struct {
  void* dst;
  int64_t dst_stride;  // bytes
  const void* src;
  int64_t src_stride;  // bytes
  int64_t rows, row_bytes;
} AgCopy2d;

typedef struct {
  void* dst;
  AgDtype dt_dst;
  const void* src;
  AgDtype dt_src;
  int64_t n;
} AgCast;  // to bf16: round to nearest even, NaN stays NaN; float to integer: truncate

typedef enum { AG_UNIFORM = 0, AG_NORMAL } AgRandomKind;
// Philox4x32-10, counter = element / 4 + offset, key = seed: the value of an element depends on (seed, offset, index)
// only. Uniform on [a, b), a value that rounds up to b becomes the next one below; normal with mean a and standard
// deviation b (Box-Muller on the four words).
typedef struct {
  void* dst;
  AgDtype dt;
  int64_t n;
  AgRandomKind kind;
  double a, b;
  uint64_t seed, offset;
} AgRandom;

// ---- elementwise ------------------------------------------------------------------------------------
// y = f(x). AG_SCALE: alpha * x. May run in place.
typedef struct {
  AgUnaryOp op;
  void* y;
  const void* x;
  int64_t n;
  AgDtype dt;
  double alpha;
} AgUnary;

// dx = dy * f'(x); dx may be dy.
typedef struct {
  AgUnaryOp op;
  void* dx;
  const void *dy, *x;
  int64_t n;
  AgDtype dt;
  double alpha;
} AgUnaryGrad;

// y[i] = a[i] op b[i % nb]; n is a multiple of nb. y may be a.
typedef struct {
  AgBinaryOp op;
  void* y;
  const void *a, *b;
  int64_t n, nb;
  AgDtype dt;
} AgBinary;

// y = silu(gate) * up
typedef struct {
  void* y;
  const void *gate, *up;
  int64_t n;
  AgDtype dt;
} AgSiluMul;

typedef struct {
  void* dgate;
  void* dup;  // may be dy
  const void *dy, *gate, *up;
  int64_t n;
  AgDtype dt;
} AgSiluMulGrad;

// ---- reductions -------------------------------------------------------------------------------------
// y[j] = scale * by * sum_i x[i*ld + j], i < rows, j < cols (bias gradients, broadcast gradients)
typedef struct {
  AgGrad y;
  const void* x;
  int64_t rows, cols, ld;
  AgDtype dt;
  double scale;
  const void* by;  // one number of the accumulation dtype, on the device; NULL: 1
} AgColSum;

// *y = scale * sum of all x; y has dtype dt
typedef struct {
  void* y;
  const void* x;
  int64_t n;
  AgDtype dt;
  double scale;
} AgSum;

typedef struct {
  const void* p;
  AgDtype dt;
  int64_t n;
} AgSpan;
// *out (one double in device memory) = sum of squares over all spans, summed in double; Inf or NaN if any element is
// not finite
typedef struct {
  const AgSpan* spans;
  int64_t count;
  double* out;
} AgSumSquares;

// ---- rows -------------------------------------------------------------------------------------------
// dst[i,:] = src[index[i],:]; 0 <= index[i] < src_rows (the op has checked)
typedef struct {
  void* dst;
  const void* src;
  const int32_t* index;
  int64_t n, cols, src_rows;
  AgDtype dt;
} AgGatherRows;

// dst[index[i],:] += scale * src[i,:], in the order of i for every row (no atomics).
// index[i] < 0: the row is skipped. dst.accumulate == 0: dst [dst_rows, cols] is zeroed first. Sums are kept in acc and
// rounded once; an f64 source goes with an f64 destination only.
typedef struct {
  AgGrad dst;
  const void* src;
  const int32_t* index;
  int64_t n, cols, dst_rows;
  AgDtype dt;
  double scale;
} AgScatterAdd;

// ---- matrix product ---------------------------------------------------------------------------------
// C[m,n] = act(op(A)[m,k] op(B)[k,n] + bias[n]), row major, leading dimensions in elements.
// trans_a: A is stored [k,m]; trans_b: B is stored [n,k] (a PyTorch Linear weight).
// accumulate: C += (then act must be AG_NONE and bias NULL). f64 goes with f64 only, f32 with f32; bf16 A,B give a bf16
// or f32 C. With a bf16 C and `pre`, act is applied to the rounded `pre`, the value backward sees.
typedef struct {
  int64_t m, n, k;
  const void* a;
  int64_t lda;
  const void* b;  // may be NULL when b_packed is given; with both the result is that of b alone
  int64_t ldb;
  const void* b_packed;  // result of `pack` for this B and trans_b, or NULL
  void* c;
  int64_t ldc;
  const int32_t* c_rows;  // NULL, or row i of the result is row c_rows[i] of C
  const void* bias;       // [n] in dt, or NULL
  void* pre;              // NULL, or [m,n] (ld n, dt_c): the value before act, kept for backward
  AgDtype dt, dt_c;       // of A, B, bias; of C, pre
  AgUnaryOp act;
  int32_t trans_a, trans_b, accumulate;
} AgGemm;

// A frozen right-hand side kept in the layout the backend's gemm wants. The blob belongs to the caller.
typedef struct {
  const void* b;
  int64_t n, k, ldb;
  int32_t trans_b;
  AgDtype dt;
  void* blob;  // `pack_bytes` bytes, 64-byte aligned
} AgPack;

// ---- norms ------------------------------------------------------------------------------------------
// LayerNorm: y = (x - mean) * rstd * w + b. RMSNorm (b and mean NULL): y = x * rstd * w, rstd = 1/sqrt(mean(x^2)+eps).
typedef struct {
  void* y;
  const void *x, *w, *b;
  void* mean;  // [rows] acc, out; NULL selects RMSNorm
  void* rstd;  // [rows] acc, out
  int64_t rows, cols;
  double eps;
  AgDtype dt;
} AgNorm;

typedef struct {
  void* dx;  // may be NULL
  AgGrad dw, db;
  const void *dy, *x, *w, *mean, *rstd;
  int64_t rows, cols;
  AgDtype dt;
} AgNormGrad;

// y = softmax(x) over the last dimension
typedef struct {
  void* y;
  const void* x;
  int64_t rows, cols;
  AgDtype dt;
} AgSoftmax;
// dx = y * (dy - sum(dy * y))
typedef struct {
  void* dx;
  const void *dy, *y;
  int64_t rows, cols;
  AgDtype dt;
} AgSoftmaxGrad;

// y = x / |x|_2 per row; norm [rows] acc is kept (no epsilon, as CLIP)
typedef struct {
  void* y;
  const void* x;
  void* norm;
  int64_t rows, cols;
  AgDtype dt;
} AgL2Norm;
typedef struct {
  void* dx;
  const void *dy, *y, *norm;
  int64_t rows, cols;
  AgDtype dt;
} AgL2NormGrad;

// ---- attention --------------------------------------------------------------------------------------
// Rotary embedding in the Hugging Face layout (first half with second half), in place, of the queries and keys of rows
// [queries | keys | values]. For each of their heads
//   x[i] <- x[i] * cos - x[i + dim/2] * sin,  x[i + dim/2] <- x[i + dim/2] * cos + x[i] * sin
// with row position[t] of the tables. sign = -1 gives the inverse rotation (the gradient).
// With caches, row t's rotated keys and its values are also written to their row slot[t]; no two slots are equal.
typedef struct {
  void* x;                  // [tokens, (heads + 2*kv_heads)*dim]
  const int32_t* position;  // [tokens]
  const void* cos;          // [max_position, dim/2] acc
  const void* sin;
  int64_t tokens, heads, kv_heads, dim;
  double sign;
  void* k_cache;  // [.., kv_heads*dim], or NULL as v_cache
  void* v_cache;
  const int32_t* slot;  // [tokens]
  AgDtype dt;
} AgRope;

// Packed sequences: sequence s owns query rows q_offsets[s]..q_offsets[s+1] and key rows k_offsets[s]..
// Head h reads columns h*dim.. of its row; query head h uses key head h / (heads / kv_heads).
// causal: the last query of a sequence is aligned with its last key. A query without keys gives zero.
typedef struct {
  const void *q, *k, *v;
  void* o;    // [tokens, heads*dim]
  void* lse;  // [tokens, heads] acc: log-sum-exp of the scaled scores
  int64_t ldq, ldk, ldv, ldo;
  const int32_t* q_offsets;  // [batch + 1]
  const int32_t* k_offsets;
  int64_t batch, heads, kv_heads, dim;
  double scale;
  int32_t causal;
  AgDtype dt;
  int64_t q_tokens,
      k_tokens;  // rows of q and k: q_offsets[batch] and k_offsets[batch], which a device's host does not read
} AgAttention;
// Strides are those of q, k, v and o.
typedef struct {
  AgAttention forward;  // o and lse are what it left
  const void* d_o;
  void *dq, *dk, *dv;
} AgAttentionGrad;

// Attention against a paged cache. Logical key j of sequence s is row j % block_size of block
// block_table[s * max_blocks + j / block_size]; the cache is [blocks, block_size, kv_heads*dim].
// The queries of a sequence are its last ones: query i of n sees keys 0 .. kv_len[s] - n + i.
typedef struct {
  const void* q;
  int64_t ldq;
  const void *k_cache, *v_cache;
  void* o;
  int64_t ldo;
  const int32_t* q_offsets;  // [batch + 1]
  const int32_t* block_table;
  const int32_t* kv_len;  // [batch]
  int64_t batch, max_blocks, block_size, heads, kv_heads, dim;
  double scale;
  AgDtype dt;
  int64_t q_tokens;  // rows of q
} AgAttentionCached;

// ---- AlignGPT ---------------------------------------------------------------------------------------
// alignMix: last projector layer + level mix + splice into the packed sequence (arXiv 2405.14129, section 3).
//   rows_m = x_m W^T + b                                 written to out[image_row[m] ..+patches]
//   mean_m = mean of embed[gate_ids of m]                (AG_MIX_GATE)
//   dots_m[p] = <rows_m[p], mean_m>                      on the stored, rounded rows
//   logits_m = W1 gelu(W0 dots_m + b0) + b1,  coef_m = [softmax(logits_m), global]
//   out[align_row[m]] = coef_m . table
//   out[t] = embed[token[t]] for token[t] >= 0
// AG_MIX_LEVEL: coef = one-hot of level[m]. AG_MIX_FIXED: coef is given.
typedef enum { AG_MIX_LEVEL = 0, AG_MIX_GATE, AG_MIX_FIXED } AgMixMode;
#define AG_ALIGN_TOKEN (-1)
#define AG_IMAGE_TOKEN (-2)
typedef struct {
  int64_t tokens, hidden, vocab, images, patches, features, levels, gate_hidden;
  const void* x;             // [images*patches, features]
  const void* w;             // [hidden, features]; NULL: no projector, features == hidden
  const void* w_packed;      // `pack` of w as a transposed right-hand side, or NULL; the gradient needs w itself for dx
  const void* b;             // [hidden] or NULL
  const void* embed;         // [vocab, hidden]
  const int32_t* token;      // [tokens] id, AG_ALIGN_TOKEN or AG_IMAGE_TOKEN
  const int32_t* image_row;  // [images]
  const int32_t* align_row;  // [images]
  const int32_t* gate_ids;   // [gate_entries]; -1 behind the last offset
  const int32_t* gate_offsets;  // [images + 1]; an empty list gives a mean of zero
  int64_t gate_entries;
  const void* table;  // [levels, hidden]
  AgMixMode mode;
  const int32_t* level;  // [images]
  const void* gw0;       // [gate_hidden, patches]
  const void* gb0;       // [gate_hidden]
  const void* gw1;       // [levels-1, gate_hidden]
  const void* gb1;       // [levels-1]
  double global;         // coefficient of the last row in AG_MIX_GATE: 1, or 0 for "local only"
  AgDtype dt;
  // results
  void* out;       // [tokens, hidden]
  void* mean;      // [images, hidden] acc
  void* dots;      // [images, patches] acc
  void* gate_pre;  // [images, gate_hidden] acc: before the gate's gelu
  void* logits;    // [images, levels-1] acc
  void* coef;      // [images, levels] acc; input when AG_MIX_FIXED
} AgAlignMix;
typedef struct {
  AgAlignMix forward;  // its results are what it left
  const void* d_out;
  void* dx;  // [images*patches, features] dt or NULL
  AgGrad dw, db, d_embed, d_table, d_gw0, d_gb0, d_gw1, d_gb1;
} AgAlignMixGrad;

// ---- loss -------------------------------------------------------------------------------------------
#define AG_IGNORE (-100) /* target of a row without a label, as in PyTorch */
// nll[i] = logsumexp(logits[i]) - logits[i, target[i]];
// dlogits (when not NULL) = (softmax(logits) - onehot) * grad_scale; may be logits itself when the dtypes are equal;
// dt_d counts only then.
typedef struct {
  const void* logits;  // [rows, cols] dt
  int64_t rows, cols;
  const int32_t* target;  // [rows], below cols; negative: the row counts for nothing, nll and dlogits are 0
  void* nll;              // [rows] acc
  void* dlogits;          // dt_d
  double grad_scale;
  const void* scale;  // [] acc or NULL: grad_scale is multiplied with it, so that recorded work can be launched with
                      // another one
  AgDtype dt, dt_d;
} AgCrossEntropy;

// ---- images -----------------------------------------------------------------------------------------
// pixels [images, channels, height, width] -> rows [images * (height/patch) * (width/patch), channels*patch*patch],
// the order of a Conv2d weight [out, channels, patch, patch] read as a matrix.
typedef struct {
  void* out;
  const void* pixels;
  int64_t images, channels, height, width, patch;
  AgDtype dt;
} AgPatchify;

// ---- optimizer, sampling ----------------------------------------------------------------------------
// PyTorch's AdamW (decoupled decay): p *= 1 - lr*wd; m += (1-b1)(g-m); v = b2 v + (1-b2) g^2;
// p -= lr/(1-b1^step) * m / (sqrt(v)/sqrt(1-b2^step) + eps), with g = grad * min(1, max_norm / (norm + 1e-6)).
//
// A bf16 parameter is the rounding of an f32 value that the update works on. Where the rest of that value is:
//   AG_STATE_FULL     in `master`, the f32 value itself; m and v are f32
//   AG_STATE_COMPACT  in `master`, as int16: bits of the f32 value - (bits of p << 16), where p is the value
//                     rounded to the nearest, ties away from zero, so nothing is lost; m and v are bf16, rounded
//                     stochastically: (bits + r) >> 16 with r the low (m) or high (v) 16 bits of random(first + i).
// random(i) = mix(low(i) ^ mix(high(i) ^ mix(low(step) ^ mix(low(seed) ^ mix(high(seed)))))), of 32-bit halves, where
// mix(x): x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16.
typedef enum { AG_STATE_FULL = 0, AG_STATE_COMPACT } AgOptimizerState;
typedef struct {
  void* p;  // f32 or bf16
  AgDtype dt_p;
  const void* g;  // f32 or bf16
  AgDtype dt_g;
  AgOptimizerState state;  // AG_STATE_FULL when p is f32
  void* master;            // NULL when p is f32
  void* m;
  void* v;
  int64_t n;
  int64_t first;  // number of this tensor's first element in the random numbers of the update
  double lr_scale, weight_decay;
} AgAdamWTensor;
// What changes from one update to the next; in device memory, so that a captured graph can be launched again.
typedef struct {
  double lr;
  int64_t step;  // 1 for the first
} AgAdamWStep;
typedef struct {
  const AgAdamWTensor* tensors;
  int64_t count;
  double beta1, beta2, eps;
  const AgAdamWStep* now;  // in device memory
  const double*
      norm_squared;  // in device memory: of all gradients. Not finite: nothing is changed. NULL: not looked at
  double max_norm;   // 0: gradients are taken as they are
  uint64_t seed;
} AgAdamW;

// out[i] = an id drawn from row i. temperature 0: argmax (lowest id on ties). top_k 0 and top_p 1: no cut.
// top_k first, then the smallest set with probability >= top_p, as transformers does (ties at the k-th are kept). u[i]
// in [0,1) decides. A NaN in row i gives -1. All three arrays are in device memory, so that a captured graph can draw
// again.
typedef struct {
  const float* logits;  // [rows, cols]
  int64_t rows, cols;
  double temperature, top_p;
  int64_t top_k;
  const double* u;
  int32_t* out;
} AgSample;

#ifdef __cplusplus
}
#endif
