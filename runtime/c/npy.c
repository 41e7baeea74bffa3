#include "npy.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The type in NumPy's array protocol, "<f4". */
static void type_text(DLDataType type, char *text, size_t size) {
  char kind = type.code == DL_FLOAT ? 'f' : type.code == DL_INT ? 'i' : type.code == DL_BOOL ? 'b' : 'u';
  snprintf(text, size, "%c%c%d", type.bits == 8 ? '|' : '<', kind, type.bits / 8);
}

/* A shape as Python prints a tuple; `expected` is compared with a file's header, so every comma counts. */
static void shape_text(const ModelTensor *tensor, char *text, size_t size) {
  size_t used = (size_t)snprintf(text, size, "(");
  for (int32_t i = 0; i < tensor->ndim && used < size; i++)
    used += (size_t)snprintf(text + used, size - used, "%s%lld", i ? ", " : "", (long long)tensor->shape[i]);
  if (used < size) snprintf(text + used, size - used, "%s)", tensor->ndim == 1 ? "," : "");
}

/* The value of a key in the header's dictionary, copied up to its closing character. */
static int header_value(const char *header, const char *key, const char *closing, char *value, size_t size) {
  const char *at = strstr(header, key);
  if (!at || !(at = strchr(at + strlen(key), ':'))) return -1;
  at += 1 + strspn(at + 1, " '");
  size_t length = strcspn(at, closing) + (closing[0] == ')');
  if (length >= size) return -1;
  memcpy(value, at, length);
  value[length] = 0;
  return 0;
}

static int read_open(FILE *file, const char *path, const ModelTensor *tensor, void *data) {
  unsigned char start[12];
  char header[4096], type[8], wanted_type[8], order[8], shape[512], wanted_shape[512];
  if (fread(start, 1, 10, file) != 10 || memcmp(start, "\x93NUMPY", 6))
    return bnncc_fail("%s: not a .npy file", path);
  size_t length = start[8] | (size_t)start[9] << 8;
  if (start[6] > 1) { /* version 2 and 3: four bytes of length */
    if (fread(start + 10, 1, 2, file) != 2) return bnncc_fail("%s: truncated", path);
    length |= (size_t)start[10] << 16 | (size_t)start[11] << 24;
  }
  if (length >= sizeof header || fread(header, 1, length, file) != length)
    return bnncc_fail("%s: its .npy header is truncated or too long", path);
  header[length] = 0;
  if (header_value(header, "'descr'", "'", type, sizeof type) ||
      header_value(header, "'fortran_order'", ",}", order, sizeof order) ||
      header_value(header, "'shape'", ")", shape, sizeof shape))
    return bnncc_fail("%s: its .npy header is not one of a plain array", path);
  type_text(tensor->type, wanted_type, sizeof wanted_type);
  shape_text(tensor, wanted_shape, sizeof wanted_shape);
  if (strcmp(type, wanted_type))
    return bnncc_fail("%s: input '%s' wants dtype %s (%s), the file has %s", path, tensor->name, tensor->dtype,
                      wanted_type, type);
  if (strcmp(shape, wanted_shape))
    return bnncc_fail("%s: input '%s' wants shape %s, the file has %s", path, tensor->name, wanted_shape, shape);
  if (!strncmp(order, "True", 4))
    return bnncc_fail("%s: the array is in Fortran order; save np.ascontiguousarray(a)", path);
  if (fread(data, 1, tensor->bytes, file) != tensor->bytes)
    return bnncc_fail("%s: truncated: input '%s' takes %zu bytes", path, tensor->name, tensor->bytes);
  return 0;
}

int npy_read(const char *path, const ModelTensor *tensor, void *data) {
  FILE *file = fopen(path, "rb");
  if (!file) return bnncc_fail("%s: %s", path, strerror(errno));
  int failed = read_open(file, path, tensor, data);
  fclose(file);
  return failed;
}

int npy_write(const char *path, const ModelTensor *tensor, const void *data) {
  char type[8], shape[512], header[1024], temporary[4096];
  type_text(tensor->type, type, sizeof type);
  shape_text(tensor, shape, sizeof shape);
  int length = snprintf(header, sizeof header, "{'descr': '%s', 'fortran_order': False, 'shape': %s, }", type, shape);
  /* The data must begin at a multiple of 64; the header is padded with spaces and ends in a newline. */
  int padded = (10 + length + 1 + 63) / 64 * 64 - 10;
  unsigned char start[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, (unsigned char)(padded & 255),
                             (unsigned char)(padded >> 8)};
  if (snprintf(temporary, sizeof temporary, "%s.part", path) >= (int)sizeof temporary)
    return bnncc_fail("%s: the path is too long", path);
  FILE *file = fopen(temporary, "wb");
  if (!file) return bnncc_fail("%s: %s", temporary, strerror(errno));
  int good = fwrite(start, 1, sizeof start, file) == sizeof start &&
             fprintf(file, "%-*s\n", padded - 1, header) == padded &&
             fwrite(data, 1, tensor->bytes, file) == tensor->bytes;
  good = !fclose(file) && good;
  if (good && !rename(temporary, path)) return 0;
  bnncc_fail("%s: %s", path, strerror(errno));
  unlink(temporary);
  return -1;
}
