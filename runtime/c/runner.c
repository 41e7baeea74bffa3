/* The command line of the runner executable. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "npy.h"
#include "serve.h"

static const char usage[] =
    "usage: %s --input a.npy [--input b.npy ...] --output y.npy [--output z.npy ...] [--threads T] [--bench N]\n"
    "       %s --bench N [--threads T]     times N runs; inputs that are not given are zero\n"
    "       %s --manifest                  prints the manifest (JSON)\n"
    "       %s --serve                     answers requests on standard input (serve.h)\n"
    "Inputs and outputs are .npy files in the model's order:\n";

static int complain(const char *program) {
  fprintf(stderr, "%s: %s\n", program, bnncc_error());
  return 1;
}

static void print_port(const char *role, const Description *port) {
  printf("  %s %s %s (", role, port->name, port->dtype);
  for (int32_t i = 0; i < port->ndim; i++) printf("%s%lld", i ? ", " : "", (long long)port->shape[i]);
  printf("%s)\n", port->ndim == 1 ? "," : "");
}

static void print_help(const char *program) {
  printf(usage, program, program, program, program);
  for (int32_t i = 0; i < bnncc_model.input_count; i++) print_port("input ", &bnncc_model.input_descriptions[i]);
  for (int32_t i = 0; i < bnncc_model.output_count; i++) print_port("output", &bnncc_model.output_descriptions[i]);
  if (bnncc_model.version_count > 1) printf("Versions, of which BNNCC_VERSION=NAME forces one:\n");
  for (int32_t i = 0; i < bnncc_model.version_count && bnncc_model.version_count > 1; i++)
    printf("  %s\n", bnncc_model.versions[i].name);
}

static int compare(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static int bench(Instance *instance, int count) {
  double *seconds = malloc((size_t)count * sizeof *seconds), sum = 0;
  if (!seconds) return bnncc_fail("out of memory for %d times", count);
  if (timed_run(instance) < 0) return -1; /* warms up: the first run starts threads */
  for (int i = 0; i < count; i++) {
    if ((seconds[i] = timed_run(instance)) < 0) return -1;
    sum += seconds[i];
  }
  qsort(seconds, (size_t)count, sizeof *seconds, compare);
  printf("%d runs of %s: min %.4f ms, median %.4f ms, mean %.4f ms\n", count, bnncc_version(instance)->name,
         1e3 * seconds[0], 1e3 * seconds[count / 2], 1e3 * sum / count);
  free(seconds);
  return 0;
}

/* A whole number from 1 (or `least`) up, or -1 with bnncc_error set. */
static int number(const char *option, const char *text, int least) {
  char *end;
  long value = strtol(text, &end, 10);
  if (*text && !*end && value >= least && value <= 1000000000) return (int)value;
  return bnncc_fail("%s wants a whole number from %d up, not '%s'", option, least, text);
}

typedef struct {
  const char **inputs, **outputs; /* paths */
  int input_count, output_count, count, threads, serve;
} Options;

static int parse(int argc, char **argv, Options *options) {
  for (int i = 1; i < argc; i++) {
    const char *option = argv[i];
    if (!strcmp(option, "--serve")) {
      options->serve = 1;
      continue;
    }
    if (strcmp(option, "--input") && strcmp(option, "--output") && strcmp(option, "--bench") &&
        strcmp(option, "--threads"))
      return bnncc_fail("unknown option '%s'; see --help", option);
    if (++i == argc) return bnncc_fail("%s wants a value", option);
    if (!strcmp(option, "--input")) options->inputs[options->input_count++] = argv[i];
    if (!strcmp(option, "--output")) options->outputs[options->output_count++] = argv[i];
    if (!strcmp(option, "--bench") && (options->count = number(option, argv[i], 1)) < 0) return -1;
    if (!strcmp(option, "--threads") && (options->threads = number(option, argv[i], 0)) < 0) return -1;
  }
  if (options->serve) return 0;
  if (options->input_count != bnncc_model.input_count && (options->input_count || !options->count))
    return bnncc_fail("the model has %d inputs, %d given; see --help", (int)bnncc_model.input_count,
                      options->input_count);
  if (options->output_count > bnncc_model.output_count)
    return bnncc_fail("the model has %d outputs, %d given", (int)bnncc_model.output_count, options->output_count);
  return 0;
}

/* Fills an input's home from a file, or with zeros where none is given. */
static int read_input(Instance *instance, int32_t port, const char *path) {
  const ModelTensor *tensor = &bnncc_version(instance)->tensors[port];
  void *data = calloc(1, tensor->bytes + 1);
  if (!data) return bnncc_fail("out of memory for input '%s'", tensor->name);
  int failed = (path && npy_read(path, tensor, data)) ||
               bnncc_copy(instance, bnncc_tensor_data(instance, port), data, tensor->bytes);
  free(data);
  return failed ? -1 : 0;
}

static int write_output(Instance *instance, int32_t port, const char *path) {
  const ModelTensor *tensor = &bnncc_version(instance)->tensors[port];
  void *data = malloc(tensor->bytes + 1);
  if (!data) return bnncc_fail("out of memory for output '%s'", tensor->name);
  int failed = bnncc_copy(instance, data, bnncc_tensor_data(instance, port), tensor->bytes) ||
               npy_write(path, tensor, data);
  free(data);
  return failed ? -1 : 0;
}

static int run(Instance *instance, const Options *options) {
  const ModelVersion *version = bnncc_version(instance);
  if (bnncc_set_threads(instance, options->threads)) return -1;
  if (options->serve) return serve(instance);
  for (int32_t i = 0; i < bnncc_model.input_count; i++)
    if (read_input(instance, version->inputs[i], i < options->input_count ? options->inputs[i] : NULL)) return -1;
  if (bnncc_run_steps(instance, 0, version->step_count)) return -1;
  for (int32_t i = 0; i < options->output_count; i++)
    if (write_output(instance, version->outputs[i], options->outputs[i])) return -1;
  return options->count ? bench(instance, options->count) : 0;
}

int main(int argc, char **argv) {
  for (int i = 1; i < argc; i++) {
    if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) return print_help(argv[0]), 0;
    if (!strcmp(argv[i], "--manifest")) return puts(bnncc_model.manifest), 0;
  }
  const char *inputs[argc], *outputs[argc];
  Options options = {.inputs = inputs, .outputs = outputs};
  if (argc == 1) return print_help(argv[0]), 2;
  if (parse(argc, argv, &options)) return complain(argv[0]), 2;
  Instance *instance = bnncc_create(&bnncc_model, NULL, -1);
  int failed = !instance || run(instance, &options);
  if (failed) complain(argv[0]);
  bnncc_destroy(instance);
  return failed;
}
