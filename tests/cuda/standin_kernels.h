/* The kernels of tests/cuda/driver_cases.py: each does for every thread of the grid what one thread would. */
#include <math.h>

enum { ROWS = 6, COLUMNS = 1024, ALL = ROWS * COLUMNS };

static void run_double(float *const *a, size_t threads) {
  for (size_t i = 0; i < threads && i < COLUMNS; i++) a[1][i] = a[0][i] + a[0][i];
}

static void run_affine(float *const *a, size_t threads) {
  for (size_t i = 0; i < threads && i < ALL; i++) a[2][i] = a[0][i] * a[1][i % COLUMNS] + 1;
}

static void run_exp(float *const *a, size_t threads) {
  for (size_t i = 0; i < threads && i < ALL; i++) a[1][i] = expf(a[0][i]);
}

static void run_flip(float *const *a, size_t threads) {
  for (size_t i = 0; i < threads && i < ALL; i++)
    a[1][i] = a[0][i / COLUMNS * COLUMNS + COLUMNS - 1 - i % COLUMNS] + 1;
}

static void run_count(float *const *a, size_t threads) {
  int64_t *n = (int64_t *)a[0], *m = (int64_t *)a[1];
  for (size_t i = 0; i < threads && i < 3; i++) m[i] = n[i] + 1;
}

static const struct Kernel kernels[] = {
    {"double_kernel", 2, run_double}, {"affine_kernel", 3, run_affine}, {"exp_kernel", 2, run_exp},
    {"flip_kernel", 2, run_flip},     {"count_kernel", 2, run_count},
};
