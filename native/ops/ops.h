// native/ops: each op checks its arguments, allocates its result, runs kernels and records how to go back. The addon
// calls them; a file here sees core and its own folder. One file a topic, and headers for what topics share (checks,
// linear, offload). Shapes use B batch, T tokens, D/H width, V vocabulary, P patches, M images, N alignment levels.
#pragma once
#include <string>
#include <vector>

#include "checks.h"

namespace ag::ops {

// Arguments of the ops that take many: the list of fields is the struct and what the addon reads from a JavaScript
// object. F(type, field, name in JavaScript)
#define AG_FIELD(type, field, name) type field{};

// ---- shape.cc --------------------------------------------------------------------------------------
Tensor cast(const Tensor& x, const std::string& dtype);
Tensor to(const Tensor& x, Device* device);
Tensor reshape(const Tensor& x, const std::vector<int64_t>& shape);
Tensor slice(const Tensor& x, int64_t dim, int64_t start, int64_t end);
Tensor concat(const std::vector<Tensor>& xs, int64_t dim);
void fill(const Tensor& x, double value);
void copy(const Tensor& dst, const Tensor& src);  // converts dtypes
void random(const Tensor& x, const std::string& kind, double a, double b, double seed, double offset);

// ---- rows.cc ---------------------------------------------------------------------------------------
Tensor gather(const Tensor& x, const Tensor& index);       // rows of x [n, ...]
Tensor embedding(const Tensor& ids, const Tensor& table);  // ids i32 [T], table [V, D] -> [T, D]

// ---- elementwise.cc --------------------------------------------------------------------------------
Tensor add(const Tensor& a, const Tensor& b);  // b may be a suffix of a's shape
Tensor sub(const Tensor& a, const Tensor& b);
Tensor mul(const Tensor& a, const Tensor& b);
Tensor scale(const Tensor& x, double alpha);
Tensor unary(const Tensor& x, const std::string& name);  // gelu gelu_tanh quick_gelu silu exp
Tensor silu_mul(const Tensor& gate, const Tensor& up);
Tensor sum(const Tensor& x);  // -> []
Tensor mean(const Tensor& x);

// ---- linear.cc -------------------------------------------------------------------------------------
// Keeps w [R, C] once more as the products x W^T (trans_b) or x W take it fastest, until its values are written to or
// it wants a gradient. Returns the bytes that takes.
int64_t pack(const Tensor& w, bool trans_b);
void unpack(const Tensor& w);
// y = act(x W^T + b): x [..., K], W [N, K], b [N]
Tensor linear(const Tensor& x, const Tensor& w, const Opt& b, const std::string& act);
// y = (silu(gate) * up) W^T + b: gate, up [..., K], W [N, K], b [N]
Tensor silu_mul_linear(const Tensor& gate, const Tensor& up, const Tensor& w, const Opt& b);
Tensor matmul(const Tensor& a, const Tensor& b, bool trans_a, bool trans_b);

// ---- qkv.cc ----------------------------------------------------------------------------------------
// Queries, keys and values beside each other: x [T, D] -> [T, (heads + 2*kvHeads)*dim].
//   weights                [heads*dim, D], [kvHeads*dim, D] twice
//   biases                 of the weights, or none
//   plus                   [T, (heads + 2*kvHeads)*dim], added to the products
//   position, cos, sin     i32 [T]; [max, dim/2] in the accumulation type: then queries and keys are rotated
//   k_cache, v_cache       [blocks, block, kvHeads*dim]: where keys and values go, too (not recorded), ...
//   slots                  ... at these rows of them, i32 [T] ascending
#define AG_QKV_FIELDS(F)                     \
  F(Tensor, x, "x")                          \
  F(int64_t, heads, "heads")                 \
  F(int64_t, kv_heads, "kvHeads")            \
  F(std::vector<Tensor>, weights, "weights") \
  F(std::vector<Tensor>, biases, "biases")   \
  F(Opt, plus, "plus")                       \
  F(Opt, position, "position")               \
  F(Opt, cos, "cos")                         \
  F(Opt, sin, "sin")                         \
  F(Opt, k_cache, "kCache")                  \
  F(Opt, v_cache, "vCache")                  \
  F(Opt, slots, "slots")
struct QkvIn {
  AG_QKV_FIELDS(AG_FIELD)
};
Tensor qkv_linear(const QkvIn& in);

// ---- patch.cc --------------------------------------------------------------------------------------
// CLIP: pixels [M, C, S, S], weight [D, C, p, p], class [D], position [P+1, D] -> [M, P+1, D]
Tensor patch_embedding(const Tensor& pixels, const Tensor& weight, const Tensor& cls, const Tensor& position);

// ---- norm.cc ---------------------------------------------------------------------------------------
Tensor layer_norm(const Tensor& x, const Tensor& w, const Tensor& b, double eps);
Tensor rms_norm(const Tensor& x, const Tensor& w, double eps);
Tensor softmax(const Tensor& x);
Tensor l2_normalize(const Tensor& x);

// ---- attention.cc ----------------------------------------------------------------------------------
// q [T, heads*dim], k, v [S, kvHeads*dim], offsets i32 [batch+1] -> [T, heads*dim]. Without k and v, q is what
// qkvLinear gives.
Tensor attention(const Tensor& q, const Opt& k, const Opt& v, const Tensor& q_offsets, const Tensor& k_offsets,
                 int64_t heads, int64_t kv_heads, bool causal, double scale);

// ---- kv_cache.cc (inference only: nothing is recorded) ---------------------------------------------
// Of qkvLinear's rows only the queries are read; caches [blocks, block, kvHeads*dim].
Tensor attention_cached(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, const Tensor& q_offsets,
                        const Tensor& block_table, const Tensor& kv_len, int64_t heads, int64_t kv_heads, double scale);

// ---- sampling.cc (inference only) ------------------------------------------------------------------
// logits f32 [B, V], one uniform number in [0, 1) per row -> ids
std::vector<double> sample(const Tensor& logits, double temperature, int64_t top_k, double top_p,
                           const std::vector<double>& uniform);

// ---- align.cc --------------------------------------------------------------------------------------
// -> inputsEmbeds [T, H], textMean [M, H], dots [M, P], gateLogits [M, N-1], coefficients [M, N]
//   x                        [M*P, features]
//   embed, table, tokens     [V, H]; [N, H]; i32 [T]
//   image_rows, align_rows   i32 [M]
//   mode                     level (levels: i32 [M]), fixed (coefficients: [M, N] in the accumulation type) or
//                            gate (gate_ids, gate_offsets: i32; gate: w0 [256, P], b0, w1 [N-1, 256], b1)
#define AG_ALIGN_MIX_FIELDS(F)         \
  F(Tensor, x, "x")                    \
  F(Opt, weight, "weight")             \
  F(Opt, bias, "bias")                 \
  F(Tensor, embed, "embed")            \
  F(Tensor, table, "table")            \
  F(Tensor, tokens, "tokens")          \
  F(Tensor, image_rows, "imageRows")   \
  F(Tensor, align_rows, "alignRows")   \
  F(int64_t, patches, "patches")       \
  F(std::string, mode, "mode")         \
  F(Opt, levels, "levels")             \
  F(Opt, coefficients, "coefficients") \
  F(Opt, gate_ids, "gateIds")          \
  F(Opt, gate_offsets, "gateOffsets")  \
  F(std::vector<Tensor>, gate, "gate") \
  F(bool, global, "global")
struct AlignMixIn {
  AG_ALIGN_MIX_FIELDS(AG_FIELD)
};
std::vector<Tensor> align_mix(const AlignMixIn& in);

// ---- loss.cc ---------------------------------------------------------------------------------------
// mean over `denominator` of the cross entropy of hidden[rows] W^T against targets, in chunks of rows.
// `scale`, one number on the device, multiplies loss and gradients; rows with a negative target count for nothing.
// -> loss [], nll [rows]
std::vector<Tensor> lm_head_loss(const Tensor& hidden, const Tensor& weight, const Tensor& rows, const Tensor& targets,
                                 double denominator, int64_t chunk, const Opt& scale);
Tensor cross_entropy(const Tensor& logits, const Tensor& targets);  // mean, -> []
// image, text [B, D] unit rows, log_scale [1] -> symmetric InfoNCE loss []
Tensor contrastive_loss(const Tensor& image, const Tensor& text, const Tensor& log_scale);

// ---- adamw.cc --------------------------------------------------------------------------------------
Tensor sum_squares(const std::vector<Tensor>& xs);  // f64 []; Inf or NaN when any element is not finite
// One update over all parameters; the lists have an entry for each.
//   masters        empty for f32 parameters
//   m, v           their dtype is the state's (AgAdamW)
//   norm_squared   of sum_squares: nothing changes when it is not finite
//   max_norm       0: no clipping
#define AG_ADAMW_FIELDS(F)                            \
  F(std::vector<Tensor>, params, "params")            \
  F(std::vector<Tensor>, grads, "grads")              \
  F(std::vector<Opt>, masters, "masters")             \
  F(std::vector<Tensor>, m, "m")                      \
  F(std::vector<Tensor>, v, "v")                      \
  F(std::vector<double>, lr_scale, "lrScale")         \
  F(std::vector<double>, weight_decay, "weightDecay") \
  F(double, beta1, "beta1")                           \
  F(double, beta2, "beta2")                           \
  F(double, eps, "eps")                               \
  F(double, lr, "lr")                                 \
  F(double, step, "step")                             \
  F(Opt, norm_squared, "normSquared")                 \
  F(double, max_norm, "maxNorm")                      \
  F(double, seed, "seed")
struct AdamWIn {
  AG_ADAMW_FIELDS(AG_FIELD)
};
void adamw(const AdamWIn& in);

}  // namespace ag::ops
