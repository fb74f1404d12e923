// Compiled, never run, by rung 7 of scripts/cuda/check.mjs where a cublasLt.h is: our prototypes and values, and the
// list the tests go by, against the real ones.
#include <cublasLt.h>

#include <cstddef>
#include <type_traits>

#include "cuda/cublas.h"
#include "values.h"

#define SAME(name, value, ours) static_assert(int(name) == value && int(name) == gpu::lt::ours, #name);
CUBLASLT_VALUES(SAME)
static_assert(CUBLAS_STATUS_SUCCESS == 0, "success");

// An argument as the calling convention sees it: a pointer, or a number of so many bytes.
template <class T>
constexpr int kind = std::is_pointer<T>::value ? 0 : int(sizeof(T));
template <class Theirs, class Ours>
struct Alike {
  static constexpr bool value = false;
};
template <class R, class... P, class S, class... Q>
struct Alike<R(P...), S(Q...)> {
  template <bool... each>
  static constexpr bool all() {
    return (each && ...);
  }
  static constexpr bool check() {
    if constexpr (sizeof...(P) != sizeof...(Q))
      return false;
    else
      return kind<R> == kind<S> && all<(kind<P> == kind<Q>)...>();
  }
  static constexpr bool value = check();
};
#define ALIKE(member, name) \
  static_assert(Alike<decltype(name), std::remove_pointer<decltype(gpu::lt::Functions::member)>::type>::value, #name);
ALIKE(get_version, cublasLtGetVersion)
ALIKE(status_name, cublasLtGetStatusName)
ALIKE(create, cublasLtCreate)
ALIKE(desc_create, cublasLtMatmulDescCreate)
ALIKE(desc_set, cublasLtMatmulDescSetAttribute)
ALIKE(desc_destroy, cublasLtMatmulDescDestroy)
ALIKE(layout_create, cublasLtMatrixLayoutCreate)
ALIKE(layout_destroy, cublasLtMatrixLayoutDestroy)
ALIKE(preference_create, cublasLtMatmulPreferenceCreate)
ALIKE(preference_set, cublasLtMatmulPreferenceSetAttribute)
ALIKE(preference_destroy, cublasLtMatmulPreferenceDestroy)
ALIKE(heuristic, cublasLtMatmulAlgoGetHeuristic)
ALIKE(matmul, cublasLtMatmul)

typedef cublasLtMatmulHeuristicResult_t Theirs;
typedef gpu::lt::HeuristicResult Ours;
static_assert(sizeof(cublasLtMatmulAlgo_t) == sizeof(gpu::lt::Algo), "algorithm");
static_assert(sizeof(Theirs) == sizeof(Ours) && alignof(Theirs) == alignof(Ours), "result of the heuristic");
static_assert(offsetof(Theirs, algo) == offsetof(Ours, algo) &&
                  offsetof(Theirs, workspaceSize) == offsetof(Ours, workspace_bytes) &&
                  offsetof(Theirs, state) == offsetof(Ours, status) &&
                  offsetof(Theirs, wavesCount) == offsetof(Ours, waves) &&
                  offsetof(Theirs, reserved) == offsetof(Ours, reserved),
              "members of the result of the heuristic");
