/* What the tests tell the stand-in for cublasLt (fake.c), and what it saw. */
#pragma once
#include <stdint.h>

typedef struct {
  /* what it answers */
  uint64_t version;
  int create_status, heuristic_status, heuristic_result, matmul_status;
  int heuristic_finds; /* algorithms it finds, 0 or 1 */
  /* what it saw */
  int64_t heuristics, products, alive; /* alive: descriptors that were not given back */
  char problem[256];                   /* the first use that the real one would not take, or take wrongly */
} FakeCublasLt;
