/* What cublasLt.h and the headers it includes say, by the names they use: read from CUDA 12.6 and 13.1 (of the package
   nvidia-cublas 13.1.1.3), which agree. The last column is our own name of the value (native/cuda/cublas.h). */
#pragma once
#define CUBLASLT_VALUES(X)                                            \
  X(CUDA_R_32F, 0, kR32F)                                             \
  X(CUDA_R_16BF, 14, kR16BF)                                          \
  X(CUBLAS_COMPUTE_32F, 68, kCompute32F)                              \
  X(CUBLAS_OP_N, 0, kOpN)                                             \
  X(CUBLAS_OP_T, 1, kOpT)                                             \
  X(CUBLASLT_MATMUL_DESC_TRANSA, 3, kTransA)                          \
  X(CUBLASLT_MATMUL_DESC_TRANSB, 4, kTransB)                          \
  X(CUBLASLT_MATMUL_DESC_EPILOGUE, 7, kEpilogue)                      \
  X(CUBLASLT_MATMUL_DESC_BIAS_POINTER, 8, kBiasPointer)               \
  X(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, 1, kMaxWorkspace)       \
  X(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, 3, kReductionSchemes) \
  X(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, 5, kAlignA)           \
  X(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, 6, kAlignB)           \
  X(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, 7, kAlignC)           \
  X(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, 8, kAlignD)           \
  X(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, 2, kReductionComputeType) \
  X(CUBLASLT_EPILOGUE_BIAS, 4, kEpilogueBias)                         \
  X(CUBLAS_STATUS_ARCH_MISMATCH, 8, kArchMismatch)                    \
  X(CUBLAS_STATUS_NOT_SUPPORTED, 15, kNotSupported)
