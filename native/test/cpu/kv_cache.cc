// Attention against the paged cache.
#include "matrix_test.h"

namespace cpu_test {
namespace {

void test_cached(const Level& l, const std::vector<int32_t>& nq, const std::vector<int32_t>& kv_len, int64_t heads,
                 int64_t kv_heads, int64_t dim, int64_t block, AgDtype dt) {
  where = text(l.name, " attention_cached ", name_of(dt), " heads ", heads, "/", kv_heads, " dim ", dim, " block ",
               block, " queries ", nq[0], " keys ", kv_len[0]);
  Attended s{nq, kv_len, heads, kv_heads, dim, true, 0};
  std::vector<int32_t> qo = offsets_of(nq), ko = offsets_of(kv_len);
  int64_t batch = int64_t(nq.size()), longest = *std::max_element(kv_len.begin(), kv_len.end()),
          max_blocks = longest / block + 2;
  int64_t ld = kv_heads * dim, blocks = batch * max_blocks + 1, ldq = heads * dim + 2;
  std::vector<int32_t> table(size_t(batch * max_blocks), -1);
  for (int64_t b = 0; b < batch; b++)  // pages lie in reverse
    for (int64_t i = 0; i <= (kv_len[size_t(b)] - 1) / block; i++)
      table[size_t(b * max_blocks + i)] = int32_t(blocks - 1 - (b * max_blocks + i));
  Buffer q = Buffer::random(dt, qo.back() * ldq, 2), o(dt, q.n, 7), kc(dt, blocks * block * ld, NAN, 0),
         vc(dt, blocks * block * ld, NAN, 0);
  std::vector<double> k, v;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t j = 0; j < kv_len[size_t(b)]; j++)
      for (int64_t i = 0; i < ld; i++) {
        int64_t at = (table[size_t(b * max_blocks + j / block)] * block + j % block) * ld + i;
        kc.set(at, uniform() * 2);
        vc.set(at, uniform());
        k.push_back(kc.at(at));
        v.push_back(vc.at(at));
      }
  AgAttentionCached a{};
  a.q = q.p(), a.ldq = a.ldo = ldq, a.k_cache = kc.p(), a.v_cache = vc.p(), a.o = o.p();
  a.q_offsets = qo.data(), a.block_table = table.data(), a.kv_len = kv_len.data();
  a.batch = batch, a.max_blocks = max_blocks, a.block_size = block, a.heads = heads, a.kv_heads = kv_heads, a.dim = dim;
  a.q_tokens = qo.back(), a.scale = 1 / std::sqrt(double(dim)), a.dt = dt;
  Reference r = attention_reference(s, a.scale, ldq, ld, q.all(), k, v, q.all(), o.all());
  on_both({&o}, [&] { launch("attention_cached", l.b.attention_cached, a); });
  double base = dt == AG_F64   ? 1e-13
                : dt == AG_F32 ? 3e-6
                               : 4e-3,
         rel = dt == AG_F64   ? 1e-12
               : dt == AG_F32 ? 3e-6
                              : 8e-3;
  compare("o", o, r.o, base, rel);
}

void test_cacheds(const Level& l) {
  for (AgDtype dt : {AG_F32, AG_BF16, AG_F64}) {
    if (elsewhere(l, dt)) continue;
    test_cached(l, {1}, {1}, 1, 1, 1, 1, dt);
    test_cached(l, {1, 1, 1}, {5, 64, 130}, 4, 2, 20, 16, dt);
    test_cached(l, {1, 4, 0, 9, 70}, {2100, 7, 3, 9, 200}, 2, 1, 64, 16, dt);
    test_cached(l, {3, 2}, {1030, 1024}, 6, 2, 33, 7, dt);
    test_cached(l, {5, 150}, {5, 300}, 3, 3, 72, 32, dt);
  }
}

const Cases kCases("kv_cache", test_cacheds);

}  // namespace
}  // namespace cpu_test
