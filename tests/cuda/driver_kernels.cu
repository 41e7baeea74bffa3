// The kernels of test_driver.py's networks: make_plan's, one thread for each element, and make_large_plan's.
#if defined(__CUDACC_RTC__)
typedef long int64_t;
#endif
extern "C" __global__ void __launch_bounds__(64) double_kernel(float* __restrict__ w, float* __restrict__ twice);
extern "C" __global__ void __launch_bounds__(64) double_kernel(float* __restrict__ w, float* __restrict__ twice) {
  int i = ((int)blockIdx.x) * 16 + ((int)threadIdx.x);
  twice[i] = w[i] + w[i];
}

extern "C" __global__ void __launch_bounds__(64) affine_kernel(float* __restrict__ h, float* __restrict__ w, float* __restrict__ x);
extern "C" __global__ void __launch_bounds__(64) affine_kernel(float* __restrict__ h, float* __restrict__ w, float* __restrict__ x) {
  int i = (((int)blockIdx.z) * 6 + ((int)blockIdx.y) * 2 + ((int)blockIdx.x)) * 16 + ((int)threadIdx.x);
  h[i] = __fmaf_rn(x[i], w[i % 64], 1.0f);
}

extern "C" __global__ void __launch_bounds__(64) exp_kernel(float* __restrict__ h, float* __restrict__ s);
extern "C" __global__ void __launch_bounds__(64) exp_kernel(float* __restrict__ h, float* __restrict__ s) {
  int i = ((int)blockIdx.x) * 16 + ((int)threadIdx.x);
  s[i] = expf(h[i]);
}

extern "C" __global__ void __launch_bounds__(64) flip_kernel(float* __restrict__ s, float* __restrict__ y);
extern "C" __global__ void __launch_bounds__(64) flip_kernel(float* __restrict__ s, float* __restrict__ y) {
  int i = ((int)blockIdx.x) * 32 + ((int)threadIdx.z) * 16 + ((int)threadIdx.y) * 4 + ((int)threadIdx.x);
  y[i] = s[i / 64 * 64 + 63 - i % 64] + 1.0f;
}

extern "C" __global__ void __launch_bounds__(64) count_kernel(int64_t* __restrict__ n, int64_t* __restrict__ m);
extern "C" __global__ void __launch_bounds__(64) count_kernel(int64_t* __restrict__ n, int64_t* __restrict__ m) {
  m[((int)threadIdx.x)] = n[((int)threadIdx.x)] + (int64_t)1;
}

extern "C" __global__ void __launch_bounds__(64) large_kernel(float* __restrict__ x, float* __restrict__ y);
extern "C" __global__ void __launch_bounds__(64) large_kernel(float* __restrict__ x, float* __restrict__ y) {
  for (int i = 0; i < 10000; ++i) {
    y[((int)blockIdx.x) * 640000 + i * 64 + ((int)threadIdx.x)] = x[((int)blockIdx.x) * 640000 + i * 64 + ((int)threadIdx.x)] + 1.0f;
  }
}
