/* The whole interface of model.h, on whatever the artifact runs on. The model: x float32 of ALL elements and n int64 [3]
 * to y, as many, which is e + 1 where x is 0, and m = n + 1. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "tiny.h"

#define CHECK(condition) \
  if (!(condition)) return printf("line %d: %s: %s\n", __LINE__, #condition, tiny_error()), 1

enum { Y = ALL * sizeof(float) };

static float x[ALL], y[ALL + 1];

static int good(const float *values, const int64_t *m) {
  for (int i = 0; i < ALL; i++)
    if (fabsf(values[i] - expf(1) - 1) > 1e-5f) return 0;
  return m[0] == 2 && m[1] == 3 && m[2] == 4;
}

int main(void) {
  int64_t n[3] = {1, 2, 3}, m[3] = {0};
  const void *inputs[] = {x, n};
  void *outputs[] = {y + 1, m};
  CHECK(!tiny_create_on(NULL, 99) && strlen(tiny_error()) > 10);
  tiny_instance *net = tiny_create(), *other = tiny_create();
  CHECK(net && other);
  int on_gpu = tiny_device(net) >= 0;
  printf("%s on %s\n", tiny_version(net), on_gpu ? "a GPU" : "the CPU");
  CHECK(on_gpu == (tiny_stream(net) != NULL));

  CHECK(!tiny_run(net, inputs, outputs) && good(y + 1, m)); /* y + 1 is not aligned */

  float *pinned = tiny_host_alloc(net, Y);
  CHECK(pinned && (uintptr_t)pinned % 64 == 0);
  memset(m, 0, sizeof m);
  outputs[0] = pinned;
  CHECK(!tiny_run(net, inputs, outputs) && good(pinned, m));

  void *there[] = {tiny_device_alloc(net, Y), tiny_device_alloc(net, 24), tiny_device_alloc(net, Y),
                   tiny_device_alloc(net, 24)};
  const void *sources[] = {there[0], there[1]};
  CHECK(there[0] && there[1] && there[2] && there[3]);
  CHECK(!tiny_copy(net, there[0], x, Y) && !tiny_copy(net, there[1], n, 24));
  CHECK(!tiny_run_device(net, sources, there + 2, NULL));
  CHECK(!tiny_wait(net, NULL) && !tiny_synchronize(net));
  memset(pinned, 0, Y);
  memset(m, 0, sizeof m);
  CHECK(!tiny_copy(net, pinned, there[2], Y) && !tiny_copy(net, m, there[3], 24) && good(pinned, m));
  if (!on_gpu) CHECK(tiny_run_device(net, sources, there + 2, pinned) == -1 && strstr(tiny_error(), "no streams"));
  sources[1] = NULL;
  CHECK(tiny_run_device(net, sources, there + 2, NULL) == -1 && strstr(tiny_error(), "input 1 is NULL"));

  CHECK(!tiny_run(other, inputs, outputs) && good(pinned, m)); /* pinned by another instance */
  CHECK(!tiny_copy(net, tiny_tensor_data(net, 0), x, Y) && !tiny_copy(net, tiny_tensor_data(net, 1), n, 24));
  CHECK(!tiny_run_steps(net, 0, 3) && tiny_run_steps(net, 2, 2) == -1 && !tiny_tensor_data(net, 99));
  CHECK(!tiny_set_threads(net, 2));
  for (int i = 0; i < 4; i++) tiny_device_free(net, there[i]);
  tiny_host_free(net, pinned);
  tiny_host_free(net, NULL);
  tiny_destroy(other);
  tiny_destroy(net);
  return 0;
}
