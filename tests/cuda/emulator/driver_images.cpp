// Which emulated library an image of device code stands for.

#include <dlfcn.h>
#include <stdio.h>

#include "driver.h"

namespace driver {
namespace {

bool equals_file(const void* image, const char* path) {
  FILE* file = fopen(path, "rb");
  if (!file) return false;
  auto* at = static_cast<const uint8_t*>(image);
  bool equal = true;
  for (int c; equal && (c = getc(file)) != EOF;) equal = *at++ == c;  // stops before it reads past a shorter image
  fclose(file);
  return equal;
}

CUresult open_library(const char* path, Module** out) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return fprintf(stderr, "emulated GPU: %s\n", dlerror()), kInvalidImage;
  auto launch = reinterpret_cast<decltype(&emu_launch)>(dlsym(library, "emu_launch"));
  auto kernel_at = reinterpret_cast<decltype(&emu_kernel_at)>(dlsym(library, "emu_kernel_at"));
  auto most_shared = reinterpret_cast<uint32_t (*)()>(dlsym(library, "emu_shared_limit"));
  if (!launch || !kernel_at || !most_shared) return kInvalidImage;
  auto* module = static_cast<Module*>(calloc(1, sizeof(Module)));
  module->launch = launch;
  module->most_shared = most_shared();
  emu_kernel kernel;
  for (uint32_t i = 0; !kernel_at(i, &kernel); i++) {
    auto* function = static_cast<Function*>(malloc(sizeof(Function)));
    *function = {module, kernel.name, kernel.parameters, kernel.static_shared, 0};
    module->functions.add(function);
  }
  *out = module;
  return 0;
}

}  // namespace

CUresult load(const void* image, int capability, Module** out) {
  const char* path = getenv("BNNCC_EMULATED");
  FILE* table = path ? fopen(path, "r") : nullptr;
  if (!table) return fprintf(stderr, "emulated GPU: BNNCC_EMULATED names no table\n"), kInvalidImage;
  char kind[16], file[1024], library[1024];
  int sm;
  CUresult result = kInvalidImage;
  while (result == kInvalidImage && fscanf(table, "%15s %d %1023s %1023s", kind, &sm, file, library) == 4) {
    if (!equals_file(image, file)) continue;
    if (!strcmp(kind, "cubin"))  // runs where the major version is the same and the minor one no smaller
      result = sm / 10 == capability / 10 && sm <= capability ? open_library(library, out) : kNoBinary;
    else if (option("ptx", 1) == 0)
      result = kUnsupportedPtx;
    else
      result = sm <= capability ? open_library(library, out) : kInvalidPtx;
  }
  fclose(table);
  if (result == kInvalidImage) fprintf(stderr, "emulated GPU: an image that the table does not have\n");
  return result;
}

}  // namespace driver
