// Cases of attention, its gradient and attention against the paged cache (cuda_test.h). Rows longer than the heads need
// and an address that is not aligned take the paths without 16-byte accesses; queries outnumber keys, sequences are
// empty. What they test besides is chosen by the backend's own variables: ALIGNGPT_DETERMINISTIC=0 for dQ with atomics,
// ALIGNGPT_ATTENTION=wgmma for the forward of capability 9.0.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "cuda_test.h"

namespace cuda_test {
namespace {

typedef std::vector<int32_t> Lengths;

std::vector<int32_t> offsets_of(const Lengths& lengths) {
  std::vector<int32_t> all{0};
  for (int32_t n : lengths) all.push_back(all.back() + n);
  return all;
}

struct Shape {
  Lengths nq, nk;
  int64_t heads, kv_heads, dim;
  bool causal;
  int64_t gap, shift;  // elements behind each row, before each buffer
};

// The columns between the rows' ends belong to nobody: they keep what they hold.
Buffer& rows(Test& t, const char* name, int64_t n, int64_t shift) { return t.in_place(name, t.dt, n).shifted(shift); }

// Whether the backend, which reads the same variable, adds up dQ in any order.
bool atomics() {
  const char* value = std::getenv("ALIGNGPT_DETERMINISTIC");
  return value && !std::strcmp(value, "0");
}

void attend(Test& t, const Shape& s) {
  const std::vector<int32_t> qo = offsets_of(s.nq), ko = offsets_of(s.nk);
  const int64_t nq = qo.back(), nk = ko.back(), ldq = s.heads * s.dim + s.gap, ldk = s.kv_heads * s.dim + s.gap;
  char label[96];
  std::snprintf(label, sizeof label, "%lld:%lld dim %lld%s queries %lld keys %lld gap %lld", (long long)s.heads,
                (long long)s.kv_heads, (long long)s.dim, s.causal ? " causal" : "", (long long)nq, (long long)nk,
                (long long)s.gap);
  Buffer &q = t.in(nq * ldq, -2, 2).shifted(s.shift), &k = t.in(nk * ldk, -2, 2).shifted(s.shift),
         &v = t.in(nk * ldk).shifted(s.shift);
  Buffer &q_offsets = t.list(qo), &k_offsets = t.list(ko);
  Buffer &o = rows(t, "o", nq * ldq, s.shift), &lse = t.out("lse", AG_F32, nq * s.heads);
  AgAttention a{};
  auto common = [&] {
    a.q = q.p(), a.k = k.p(), a.v = v.p(), a.ldq = a.ldo = ldq, a.ldk = a.ldv = ldk;
    a.q_offsets = q_offsets.i32(), a.k_offsets = k_offsets.i32(), a.batch = int64_t(s.nq.size());
    a.heads = s.heads, a.kv_heads = s.kv_heads, a.dim = s.dim, a.q_tokens = nq, a.k_tokens = nk;
    a.scale = 1 / std::sqrt(double(s.dim)), a.causal = s.causal, a.dt = t.dt;
    return a;
  };
  t.run(label, &AgBackend::attention, [&] { return common(), a.o = o.p(), a.lse = lse.p(), a; });
  Buffer &saved = t.in(nq * ldq).shifted(s.shift), &saved_lse = t.in(AG_F32, nq * s.heads),
         &d_o = t.in(nq * ldq).shifted(s.shift);
  for (int64_t i = 0; i < saved.n; i++) saved.set(i, o.cpu(i));
  for (int64_t i = 0; i < saved_lse.n; i++) saved_lse.set(i, lse.cpu(i));
  o.role = lse.role = Buffer::kInput;
  Buffer &dq = rows(t, "dq", nq * ldq, s.shift).varies(atomics() && t.dt == AG_BF16),
         &dk = rows(t, "dk", nk * ldk, s.shift), &dv = rows(t, "dv", nk * ldk, s.shift);
  t.run(label, &AgBackend::attention_grad, [&] {
    common(), a.o = saved.p(), a.lse = saved_lse.p();
    return AgAttentionGrad{a, d_o.p(), dq.p(), dk.p(), dv.p()};
  });
  t.clear();
}

void test_attention(Test& t) {
  attend(t, {{0, 1, 7, 65}, {3, 1, 9, 65}, 2, 1, 16, true, 0, 0});
  attend(t, {{7, 0, 33}, {3, 5, 70}, 4, 2, 64, true, 8, 0});  // more queries than keys: some see none
  attend(t, {{5, 2, 0}, {0, 40, 0}, 1, 1, 20, false, 3, 1});
  attend(t, {{9, 3}, {0, 5}, 2, 1, 64, true, 8, 0});  // no keys at all
  if (small()) return;
  attend(t, {{}, {}, 1, 1, 64, true, 0, 0});
  attend(t, {{130}, {130}, 1, 1, 64, true, 0, 0});
  attend(t, {{63, 1}, {130, 1}, 2, 2, 80, false, 0, 0});
  attend(t, {{70}, {97}, 8, 1, 32, true, 16, 0});
  attend(t, {{65}, {64}, 1, 1, 96, true, 0, 0});
  attend(t, {{64, 3}, {71, 66}, 2, 1, 128, true, 0, 0});
  attend(t, {{9}, {35}, 2, 2, 128, false, 1, 0});
  attend(t, {{5, 150}, {600, 160}, 1, 1, 64, false, 0, 0});  // more tiles than stages, several times over
  attend(t, {{130, 4}, {525, 300}, 2, 1, 128, true, 8, 0});
  AgAttention a{};
  a.dim = 256, a.scale = 1, a.dt = t.dt;
  t.refuse("head dim 256", &AgBackend::attention, a, AG_UNSUPPORTED);
  AgAttentionGrad g{};
  g.forward = a;
  t.refuse("head dim 256", &AgBackend::attention_grad, g, AG_UNSUPPORTED);
}

void decode(Test& t, const Lengths& nq, const Lengths& kv_len, int64_t heads, int64_t kv_heads, int64_t dim,
            int64_t block, int64_t max_blocks, int64_t gap) {
  const std::vector<int32_t> qo = offsets_of(nq);
  const int64_t batch = int64_t(nq.size()), ldq = heads * dim + gap, pages = batch * max_blocks,
                cache = pages * block * kv_heads * dim;
  std::vector<int32_t> table;
  for (int64_t i = 0; i < pages; i++)  // what lies behind a sequence's keys is no page
    table.push_back(i % max_blocks * block < kv_len[size_t(i / max_blocks)] ? int32_t(pages - 1 - i) : 1 << 28);
  char label[96];
  std::snprintf(label, sizeof label, "%lld:%lld dim %lld queries %d keys up to %lld", (long long)heads,
                (long long)kv_heads, (long long)dim, qo.back(), (long long)(max_blocks * block));
  Buffer &q = t.in(qo.back() * ldq, -2, 2), &k = t.in(cache, -2, 2), &v = t.in(cache);
  Buffer &offsets = t.list(qo), &pages_of = t.list(table), &lengths = t.list(kv_len),
         &o = rows(t, "o", qo.back() * ldq, 0);
  t.run(label, &AgBackend::attention_cached, [&] {
    AgAttentionCached a{};
    a.q = q.p(), a.ldq = a.ldo = ldq, a.k_cache = k.p(), a.v_cache = v.p(), a.o = o.p();
    a.q_offsets = offsets.i32(), a.block_table = pages_of.i32(), a.kv_len = lengths.i32();
    a.batch = batch, a.max_blocks = max_blocks, a.block_size = block, a.q_tokens = qo.back();
    a.heads = heads, a.kv_heads = kv_heads, a.dim = dim, a.scale = 1 / std::sqrt(double(dim)), a.dt = t.dt;
    return a;
  });
  t.clear();
}

void test_attention_cached(Test& t) {
  decode(t, {1, 1, 0}, {5, 37, 3}, 2, 1, 16, 16, 3, 0);
  decode(t, {1, 2}, {300, 40}, 4, 2, 20, 16, 19, 4);  // several chunks, some without a key
  if (small()) return;
  decode(t, {3, 0, 35}, {3, 0, 50}, 8, 1, 64, 7, 8, 0);
  decode(t, {1, 1}, {129, 500}, 8, 1, 128, 16, 32, 8);  // a group of heads shares its keys
  decode(t, {1, 1, 1}, {64, 65, 1}, 1, 1, 96, 32, 4, 0);
  decode(t, {40}, {300}, 2, 2, 80, 16, 20, 0);  // more queries than the warps share
  decode(t, {70, 20}, {70, 90}, 2, 1, 128, 16, 8, 8);
  decode(t, {17}, {40}, 1, 1, 37, 8, 5, 1);
  decode(t, {2, 9}, {1, 140}, 2, 2, 128, 16, 24, 0);  // a query without keys
}

const Registered kAttention("attention_packed", test_attention), kCached("attention_cached", test_attention_cached);

}  // namespace
}  // namespace cuda_test
