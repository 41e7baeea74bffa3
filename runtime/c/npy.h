/* NumPy's .npy files, as far as the runner needs them. */
#ifndef BNNCC_NPY_H
#define BNNCC_NPY_H

#include "driver.h"

/* Reads a file that must hold exactly the tensor's shape and dtype, in C order, into data. 0, or -1 with bnncc_error. */
int npy_read(const char *path, const ModelTensor *tensor, void *data);

/* Writes the tensor; the file appears whole or not at all. 0, or -1 with bnncc_error. */
int npy_write(const char *path, const ModelTensor *tensor, const void *data);

#endif
