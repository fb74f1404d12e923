/* A stand-in for libcublasLt.so: the same symbols, descriptors recorded from the bytes that are set, and a product on
   the host that is computed from nothing but those descriptors. Values and struct layouts are its own (values.h, from
   NVIDIA's headers), so a wrong one in native/cuda/cublas.h shows. It is strict where the real one is silent:
   alignments that were promised, an algorithm made for another product, a workspace that is not there, a C that is read
   although beta is 0. */
#include "fake.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "values.h"

#define EXPORT __attribute__((visibility("default")))
#define VALUE(name, value, ours) name = value,
enum { CUBLASLT_VALUES(VALUE) FAKE_SUCCESS = 0, FAKE_INVALID_VALUE = 7, FAKE_DEFAULT_EPILOGUE = 1 };

EXPORT FakeCublasLt fake_cublaslt = {.version = 130101, .heuristic_finds = 1};

typedef struct {
  int32_t compute, scale, trans_a, trans_b;
  uint32_t epilogue;
  const void* bias;
} Desc;
typedef struct {
  int32_t type;
  uint64_t rows, cols;
  int64_t ld;
} Layout;
typedef struct {
  uint64_t workspace;
  uint32_t schemes, align[4];
} Preference;
/* The 64 bytes of an algorithm: what it was chosen for. */
typedef struct {
  uint64_t stamp, product, workspace, align[5];
} Algorithm;
typedef struct {
  Algorithm algo;
  size_t workspace;
  int32_t state;
  float waves;
  int32_t reserved[4];
} Result;
_Static_assert(sizeof(Algorithm) == 64 && sizeof(Result) == 96, "as in the headers");
static const uint64_t kStamp = 0x6c7461626c756663u;

static int wrong(const char* what) {
  if (!fake_cublaslt.problem[0]) snprintf(fake_cublaslt.problem, sizeof fake_cublaslt.problem, "%s", what);
  return FAKE_INVALID_VALUE;
}

/* ---- descriptors ---------------------------------------------------------------------------------- */
static int create(void** out, const void* content, size_t bytes) {
  *out = malloc(bytes);
  memcpy(*out, content, bytes);
  __atomic_add_fetch(&fake_cublaslt.alive, 1, __ATOMIC_RELAXED);
  return FAKE_SUCCESS;
}
static int destroy(void* p) {
  free(p);
  __atomic_sub_fetch(&fake_cublaslt.alive, 1, __ATOMIC_RELAXED);
  return FAKE_SUCCESS;
}
static int put(void* to, const void* value, size_t bytes, size_t expected) {
  if (!value || bytes != expected) return wrong("an attribute of another size");
  memcpy(to, value, bytes);
  return FAKE_SUCCESS;
}

EXPORT size_t cublasLtGetVersion(void) { return fake_cublaslt.version; }
EXPORT const char* cublasLtGetStatusName(int status) {
  return status == FAKE_SUCCESS ? "CUBLAS_STATUS_SUCCESS" : "CUBLAS_STATUS_OF_THE_FAKE";
}
EXPORT int cublasLtCreate(void** handle) {
  *handle = &fake_cublaslt;
  return fake_cublaslt.create_status;
}
EXPORT int cublasLtMatmulDescCreate(void** out, int compute, int scale) {
  const Desc d = {compute, scale, CUBLAS_OP_N, CUBLAS_OP_N, FAKE_DEFAULT_EPILOGUE, NULL};
  return create(out, &d, sizeof d);
}
EXPORT int cublasLtMatmulDescDestroy(void* d) { return destroy(d); }
EXPORT int cublasLtMatmulDescSetAttribute(void* desc, int attribute, const void* value, size_t bytes) {
  Desc* d = desc;
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return put(&d->trans_a, value, bytes, 4);
    case CUBLASLT_MATMUL_DESC_TRANSB: return put(&d->trans_b, value, bytes, 4);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return put(&d->epilogue, value, bytes, 4);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return put(&d->bias, value, bytes, sizeof d->bias);
  }
  return wrong("an attribute of the product that is not expected");
}
EXPORT int cublasLtMatrixLayoutCreate(void** out, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  const Layout l = {type, rows, cols, ld};
  if (ld < (int64_t)rows) return wrong("a leading dimension below the number of rows");
  return create(out, &l, sizeof l);
}
EXPORT int cublasLtMatrixLayoutDestroy(void* l) { return destroy(l); }
EXPORT int cublasLtMatmulPreferenceCreate(void** out) {
  const Preference p = {0, 7, {256, 256, 256, 256}};
  return create(out, &p, sizeof p);
}
EXPORT int cublasLtMatmulPreferenceDestroy(void* p) { return destroy(p); }
EXPORT int cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value, size_t bytes) {
  Preference* p = preference;
  switch (attribute) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: return put(&p->workspace, value, bytes, 8);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK: return put(&p->schemes, value, bytes, 4);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES: return put(&p->align[0], value, bytes, 4);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES: return put(&p->align[1], value, bytes, 4);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES: return put(&p->align[2], value, bytes, 4);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: return put(&p->align[3], value, bytes, 4);
  }
  return wrong("a preference that is not expected");
}

/* ---- checks --------------------------------------------------------------------------------------- */
static uint64_t alignment(const void* p) {
  const uint64_t bits = (uint64_t)(uintptr_t)p | 256;
  return bits & (~bits + 1);
}
static uint64_t mix(uint64_t h, uint64_t x) { return (h ^ x) * 0x9e3779b97f4a7c15u + (h >> 29); }
static uint64_t product_of(const Desc* d, const Layout* const* l) {
  uint64_t h = mix(mix(mix(1, (uint64_t)d->trans_a), (uint64_t)d->trans_b), d->epilogue);
  for (int i = 0; i < 4; i++)
    h = mix(mix(mix(mix(h, (uint64_t)l[i]->type), l[i]->rows), l[i]->cols), (uint64_t)l[i]->ld);
  return h;
}
/* Of A, B, C and D: the types that go together, and sizes that fit. */
static int fitting(const Desc* d, const Layout* const* l) {
  const Layout *a = l[0], *b = l[1], *c = l[2], *r = l[3];
  if (d->compute != CUBLAS_COMPUTE_32F || d->scale != CUDA_R_32F) return wrong("another type to compute in");
  const int halves = a->type == CUDA_R_16BF;
  if (a->type != b->type || c->type != r->type || (!halves && (a->type != CUDA_R_32F || r->type != CUDA_R_32F)))
    return wrong("types");
  const uint64_t m = d->trans_a ? a->cols : a->rows, k = d->trans_a ? a->rows : a->cols;
  if ((d->trans_b ? b->cols : b->rows) != k || (d->trans_b ? b->rows : b->cols) != r->cols || r->rows != m)
    return wrong("sizes do not fit");
  if (c->rows != r->rows || c->cols != r->cols || c->ld != r->ld || !m || !k || !r->cols)
    return wrong("sizes of C and D");
  if (d->epilogue != FAKE_DEFAULT_EPILOGUE && d->epilogue != CUBLASLT_EPILOGUE_BIAS) return wrong("another epilogue");
  if ((d->epilogue == CUBLASLT_EPILOGUE_BIAS) != (d->bias != NULL))
    return wrong("a bias without its epilogue, or the other way round");
  return FAKE_SUCCESS;
}

#ifndef FAKE_WITHOUT_HEURISTIC
EXPORT int cublasLtMatmulAlgoGetHeuristic(void* handle, void* desc, void* a, void* b, void* c, void* d,
                                          void* preference, int wanted, Result* results, int* found) {
  const Layout* layouts[4] = {a, b, c, d};
  const Preference* p = preference;
  __atomic_add_fetch(&fake_cublaslt.heuristics, 1, __ATOMIC_RELAXED);
  if (handle != &fake_cublaslt || wanted < 1) return wrong("a handle that is not ours");
  if (fitting(desc, layouts)) return FAKE_INVALID_VALUE;
  if (p->schemes & ~(uint32_t)CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE)
    return wrong("a reduction that does not repeat or rounds to the result's type");
  if (p->workspace != (uint64_t)32 << 20) return wrong("a workspace that is not 32 MiB");
  *found = fake_cublaslt.heuristic_finds;
  if (fake_cublaslt.heuristic_status || !*found) return fake_cublaslt.heuristic_status;
  Result r = {{kStamp, product_of(desc, layouts), 4096, {0}}, 4096, fake_cublaslt.heuristic_result, 1, {0}};
  for (int i = 0; i < 4; i++) r.algo.align[i] = p->align[i];
  const void* bias = ((const Desc*)desc)->bias;
  r.algo.align[4] = bias ? alignment(bias) : 1;
  results[0] = r;
  return FAKE_SUCCESS;
}
#endif

/* ---- the product ---------------------------------------------------------------------------------- */
static double get(const void* p, int32_t type, uint64_t i) {
  if (type == CUDA_R_32F) return ((const float*)p)[i];
  const uint32_t u = (uint32_t)((const uint16_t*)p)[i] << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static void set(void* p, int32_t type, uint64_t i, float f) {
  if (type == CUDA_R_32F) {
    ((float*)p)[i] = f;
    return;
  }
  uint32_t u;
  memcpy(&u, &f, 4);
  ((uint16_t*)p)[i] = f != f ? (uint16_t)((u >> 16) | 64) : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static uint64_t at(const Layout* l, uint64_t row, uint64_t col) {
  return row + col * (uint64_t)l->ld;
} /* column-major */

static int allowed(const Desc* d, const Layout* const* l, const Algorithm* algo, const void* const* p, void* workspace,
                   size_t bytes) {
  if (fitting(d, l)) return FAKE_INVALID_VALUE;
  if (!algo || algo->stamp != kStamp || algo->product != product_of(d, l))
    return wrong("an algorithm that was made for another product");
  for (int i = 0; i < 5; i++)
    if (p[i] && alignment(p[i]) < algo->align[i]) return wrong("less alignment than was promised");
  if (!workspace || (uintptr_t)workspace % 16 || bytes < algo->workspace) return wrong("a workspace too small");
  static pthread_mutex_t stream = PTHREAD_MUTEX_INITIALIZER; /* on which one product follows another */
  pthread_mutex_lock(&stream);
  memset(workspace, 0xff, algo->workspace);
  ((char*)workspace)[bytes - 1] = 1; /* all of it is there */
  pthread_mutex_unlock(&stream);
  return FAKE_SUCCESS;
}

EXPORT int cublasLtMatmul(void* handle, void* desc, const void* alpha, const void* a, void* layout_a, const void* b,
                          void* layout_b, const void* beta, const void* c, void* layout_c, void* d, void* layout_d,
                          const void* algo, void* workspace, size_t workspace_bytes, void* stream) {
  const Layout* l[4] = {layout_a, layout_b, layout_c, layout_d};
  const Desc* o = desc;
  const void* pointers[5] = {a, b, c, d, o->bias};
  (void)stream;
  if (handle != &fake_cublaslt) return wrong("a handle that is not ours");
  if ((uintptr_t)o->bias % 16) return wrong("a bias that is not aligned to 16 bytes");
  if (allowed(o, l, algo, pointers, workspace, workspace_bytes)) return FAKE_INVALID_VALUE;
  if (fake_cublaslt.matmul_status) return fake_cublaslt.matmul_status;
  __atomic_add_fetch(&fake_cublaslt.products, 1, __ATOMIC_RELAXED);
  const double scale = *(const float*)alpha, keep = *(const float*)beta;
  const uint64_t depth = o->trans_a ? l[0]->rows : l[0]->cols;
  for (uint64_t col = 0; col < l[3]->cols; col++)
    for (uint64_t row = 0; row < l[3]->rows; row++) {
      double sum = 0;
      for (uint64_t k = 0; k < depth; k++)
        sum += get(a, l[0]->type, o->trans_a ? at(l[0], k, row) : at(l[0], row, k)) *
               get(b, l[1]->type, o->trans_b ? at(l[1], col, k) : at(l[1], k, col));
      sum *= scale;
      if (keep != 0) sum += keep * get(c, l[2]->type, at(l[2], row, col));
      if (o->bias) sum += get(o->bias, l[3]->type, row);
      set(d, l[3]->type, at(l[3], row, col), (float)sum);
    }
  return FAKE_SUCCESS;
}
