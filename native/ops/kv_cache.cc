// Inference: attention against the paged key/value cache. Nothing here is recorded.
#include "ops.h"

namespace ag::ops {

static void check_blocks(const Tensor& cache, const Tensor& q_offsets, const Tensor& blocks, const Tensor& len,
                         int64_t batch) {
  const char* op = "attentionCached";
  want_rank(op, "blockTable", blocks, 2);
  want_shape(op, "blockTable", blocks, Shape{batch, blocks.shape[1]});
  want_shape(op, "kvLen", len, Shape{batch});
  want_index(op, "kvLen", len, 0, blocks.shape[1] * cache.shape[1] + 1);
  want_i32(op, "blockTable", blocks);
  for (int64_t s = 0; s < batch; s++) {  // only the blocks a sequence really uses have to exist
    int64_t n = host_i32(q_offsets)[s + 1] - host_i32(q_offsets)[s], keys = host_i32(len)[s];
    check(keys >= n, "ERR_RANGE", "[attentionCached] kvLen[", s, "]: expected at least its ", n, " queries, got ",
          keys);
    for (int64_t b = 0; b * cache.shape[1] < keys; b++) {
      int32_t block = host_i32(blocks)[s * blocks.shape[1] + b];
      check(block >= 0 && block < cache.shape[0], "ERR_RANGE", "[attentionCached] blockTable[", s, ", ", b,
            "]: expected 0..", cache.shape[0] - 1, ", got ", block);
    }
  }
}

Tensor attention_cached(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, const Tensor& q_offsets,
                        const Tensor& block_table, const Tensor& kv_len, int64_t heads, int64_t kv_heads,
                        double scale) {
  const char* op = "attentionCached";
  want_float(op, "qkv", qkv);
  check_heads(op, heads, kv_heads);
  int64_t dim = head_dim(op, "qkv", qkv, heads + 2 * kv_heads), rows = qkv.shape[0];
  want_rank(op, "kCache", k_cache, 3);
  want_shape(op, "kCache", k_cache, Shape{k_cache.shape[0], k_cache.shape[1], kv_heads * dim});
  want_shape(op, "vCache", v_cache, k_cache.shape);
  want_dtype(op, "kCache", k_cache, qkv.dt);
  want_dtype(op, "vCache", v_cache, qkv.dt);
  int64_t batch = want_offsets(op, "qOffsets", q_offsets, rows);
  check_blocks(k_cache, q_offsets, block_table, kv_len, batch);
  want_same_device(op, {&qkv, &k_cache, &v_cache});
  Tensor o = empty(qkv.device(), Shape{rows, heads * dim}, qkv.dt);
  AgAttentionCached a{};
  a.q = qkv.data();
  a.ldq = qkv.shape[1];
  a.ldo = heads * dim;
  a.k_cache = k_cache.data();
  a.v_cache = v_cache.data();
  a.o = o.data();
  a.q_offsets = device_i32(q_offsets, qkv.device());
  a.block_table = device_i32(block_table, qkv.device());
  a.kv_len = device_i32(kv_len, qkv.device());
  a.batch = batch;
  a.q_tokens = rows;
  a.max_blocks = block_table.shape[1];
  a.block_size = k_cache.shape[1];
  a.heads = heads;
  a.kv_heads = kv_heads;
  a.dim = dim;
  a.scale = scale;
  a.dt = qkv.dt;
  run(op, qkv.device(), &AgBackend::attention_cached, a);
  return o;
}

}  // namespace ag::ops
