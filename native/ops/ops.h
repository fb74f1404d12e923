// The ops: each checks its arguments, allocates its result, runs kernels and records how to go back.
// Shapes use B batch, T tokens, D/H width, V vocabulary, P patches, M images, N alignment levels.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "../tape.h"

namespace ag::ops {

using Opt = std::optional<Tensor>;

// ---- checks (basic.cc) ------------------------------------------------------------------------------
void want_float(const char* op, const char* what, const Tensor& t);
void want_dtype(const char* op, const char* what, const Tensor& t, AgDtype dt);
void want_shape(const char* op, const char* what, const Tensor& t, const Shape& shape);
void want_rank(const char* op, const char* what, const Tensor& t, int rank);
void want_same_device(const char* op, std::initializer_list<const Tensor*> tensors);
// i32 on the CPU
void want_i32(const char* op, const char* what, const Tensor& t);
// i32 indices, each in [low, high)
void want_index(const char* op, const char* what, const Tensor& t, int64_t low, int64_t high);
// i32 [batch+1], ascending from 0 to `total`; returns batch
int64_t want_offsets(const char* op, const char* what, const Tensor& t, int64_t total);
// from column c of row 0 on
inline void* column(const Tensor& t, int64_t c) { return t.as<char>() + c * dtype_size(t.dt); }
// columns of x [T, heads*dim] -> dim (attention.cc)
int64_t head_dim(const char* op, const char* what, const Tensor& x, int64_t heads);
void check_heads(const char* op, int64_t heads, int64_t kv_heads);
AgUnaryOp parse_activation(const char* op, const std::string& name);
// Indices, offsets and ids live on the CPU, where they are checked: their values there, ...
const int32_t* host_i32(const Tensor& t);
// ... and on the device whose kernel reads them, copied once.
const int32_t* device_i32(const Tensor& t, Device* device);

// ---- basic.cc ---------------------------------------------------------------------------------------
Tensor cast(const Tensor& x, const std::string& dtype);
Tensor to(const Tensor& x, Device* device);
Tensor reshape(const Tensor& x, const std::vector<int64_t>& shape);
Tensor slice(const Tensor& x, int64_t dim, int64_t start, int64_t end);
Tensor concat(const std::vector<Tensor>& xs, int64_t dim);
Tensor gather(const Tensor& x, const Tensor& index);                      // rows of x [n, ...]
Tensor embedding(const Tensor& ids, const Tensor& table);                 // ids i32 [T], table [V, D] -> [T, D]
Tensor add(const Tensor& a, const Tensor& b);                             // b may be a suffix of a's shape
Tensor sub(const Tensor& a, const Tensor& b);
Tensor mul(const Tensor& a, const Tensor& b);
Tensor scale(const Tensor& x, double alpha);
Tensor unary(const Tensor& x, const std::string& name);                   // gelu gelu_tanh quick_gelu silu exp
Tensor silu_mul(const Tensor& gate, const Tensor& up);
Tensor sum(const Tensor& x);                                              // -> []
Tensor mean(const Tensor& x);
void fill(const Tensor& x, double value);
void copy(const Tensor& dst, const Tensor& src);                          // converts dtypes
void random(const Tensor& x, const std::string& kind, double a, double b, double seed, double offset);

// ---- linear.cc --------------------------------------------------------------------------------------
// Keeps w [R, C] once more as the products x W^T (trans_b) or x W take it fastest, until its values are written to or it
// wants a gradient. Returns the bytes that takes.
int64_t pack(const Tensor& w, bool trans_b);
void unpack(const Tensor& w);
// y = act(x W^T + b): x [..., K], W [N, K], b [N]
Tensor linear(const Tensor& x, const Tensor& w, const Opt& b, const std::string& act);
// y = (silu(gate) * up) W^T + b: gate, up [..., K], W [N, K], b [N]
Tensor silu_mul_linear(const Tensor& gate, const Tensor& up, const Tensor& w, const Opt& b);
Tensor matmul(const Tensor& a, const Tensor& b, bool trans_a, bool trans_b);
// Queries, keys and values beside each other: x [T, D] -> [T, (heads + 2*kvHeads)*dim].
struct QkvIn {
  Tensor x;
  int64_t heads, kv_heads;
  std::vector<Tensor> weights;  // [heads*dim, D], [kvHeads*dim, D] twice
  std::vector<Tensor> biases;   // of the weights, or none
  Opt plus;                     // [T, (heads + 2*kvHeads)*dim], added to the products
  Opt position, cos, sin;       // i32 [T]; [max, dim/2] in the accumulation type: then queries and keys are rotated
  Opt k_cache, v_cache, slots;  // [blocks, block, kvHeads*dim]; i32 [T] ascending: where keys and values go, too (not recorded)
};
Tensor qkv_linear(const QkvIn& in);
// CLIP: pixels [M, C, S, S], weight [D, C, p, p], class [D], position [P+1, D] -> [M, P+1, D]
Tensor patch_embedding(const Tensor& pixels, const Tensor& weight, const Tensor& cls, const Tensor& position);

// ---- norm.cc ----------------------------------------------------------------------------------------
Tensor layer_norm(const Tensor& x, const Tensor& w, const Tensor& b, double eps);
Tensor rms_norm(const Tensor& x, const Tensor& w, double eps);
Tensor softmax(const Tensor& x);
Tensor l2_normalize(const Tensor& x);

// ---- attention.cc -----------------------------------------------------------------------------------
// q [T, heads*dim], k, v [S, kvHeads*dim], offsets i32 [batch+1] -> [T, heads*dim]. Without k and v, q is what qkvLinear gives.
Tensor attention(const Tensor& q, const Opt& k, const Opt& v, const Tensor& q_offsets, const Tensor& k_offsets,
                 int64_t heads, int64_t kv_heads, bool causal, double scale);

// ---- align.cc ---------------------------------------------------------------------------------------
struct AlignMixIn {
  Tensor x;  // [M*P, features]
  Opt weight, bias;
  Tensor embed;   // [V, H]
  Tensor table;   // [N, H]
  Tensor tokens;  // i32 [T]
  Tensor image_rows, align_rows;  // i32 [M]
  int64_t patches;
  std::string mode;           // level | gate | fixed
  Opt levels;                 // i32 [M] (level)
  Opt coefficients;           // [M, N] acc (fixed)
  Opt gate_ids, gate_offsets; // i32 (gate)
  std::vector<Tensor> gate;   // w0 [256, P], b0, w1 [N-1, 256], b1 (gate)
  bool global;
};
// -> inputsEmbeds [T, H], textMean [M, H], dots [M, P], gateLogits [M, N-1], coefficients [M, N]
std::vector<Tensor> align_mix(const AlignMixIn& in);

// ---- loss.cc ----------------------------------------------------------------------------------------
// mean over `denominator` of the cross entropy of hidden[rows] W^T against targets, in chunks of rows.
// `scale`, one number on the device, multiplies loss and gradients; rows with a negative target count for nothing.
// -> loss [], nll [rows]
std::vector<Tensor> lm_head_loss(const Tensor& hidden, const Tensor& weight, const Tensor& rows, const Tensor& targets,
                                 double denominator, int64_t chunk, const Opt& scale);
Tensor cross_entropy(const Tensor& logits, const Tensor& targets);  // mean, -> []
// image, text [B, D] unit rows, log_scale [1] -> symmetric InfoNCE loss []
Tensor contrastive_loss(const Tensor& image, const Tensor& text, const Tensor& log_scale);

// ---- optim.cc ---------------------------------------------------------------------------------------
Tensor sum_squares(const std::vector<Tensor>& xs);  // f64 []; Inf or NaN when any element is not finite
// One call over all parameters. masters[i] is empty for f32 parameters; the moments' dtype is the state's (backend.h).
struct AdamWIn {
  std::vector<Tensor> params, grads;
  std::vector<Opt> masters;
  std::vector<Tensor> m, v;
  std::vector<double> lr_scale, weight_decay;
  double beta1, beta2, eps, lr, step;
  Opt norm_squared;  // of sum_squares: nothing changes when it is not finite
  double max_norm;   // 0: no clipping
  double seed;
};
void adamw(const AdamWIn& in);
// ---- decode.cc (inference only: nothing is recorded) -------------------------------------------------
// Of qkvLinear's rows only the queries are read; caches [blocks, block, kvHeads*dim].
Tensor attention_cached(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, const Tensor& q_offsets,
                        const Tensor& block_table, const Tensor& kv_len, int64_t heads, int64_t kv_heads, double scale);
// logits f32 [B, V], one uniform number in [0, 1) per row -> ids
std::vector<double> sample(const Tensor& logits, double temperature, int64_t top_k, double top_p,
                           const std::vector<double>& uniform);

}  // namespace ag::ops
