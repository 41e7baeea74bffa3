/* The runner's conversation with a program on another machine or outside an emulator; runtime/device.py is the peer.
 *
 * Standard input carries requests, standard output replies; all integers are little-endian.
 *   request: uint32 operation, first, count, bytes; then `bytes` bytes
 *   reply:   uint32 failed (0 or 1), bytes; then `bytes` bytes: the result, or the error's text
 * Tensor ids and step numbers are the manifest's, of the version that runs. The steps work on the homes of inputs and
 * outputs: write the inputs, run, read the outputs.
 */
#ifndef BNNCC_SERVE_H
#define BNNCC_SERVE_H

#include "driver.h"

typedef enum {
  SERVE_QUIT = 0,      /* replies, then ends */
  SERVE_MANIFEST = 1,  /* replies the manifest's JSON */
  SERVE_WRITE = 2,     /* tensor `first` := the bytes sent, which must be its size */
  SERVE_READ = 3,      /* replies the bytes of tensor `first` */
  SERVE_RUN_STEPS = 4, /* runs `count` steps from step `first` */
  SERVE_BENCH = 5,     /* runs all steps `count` times; replies `count` float64, seconds */
  SERVE_THREADS = 6,   /* sets `first` threads, 0 for the default */
  SERVE_VERSION = 7    /* replies the name of the version that runs */
} ServeOperation;

/* Answers until SERVE_QUIT or the end of the input; returns the exit status. */
int serve(Instance *instance);

/* Runs all steps once on the homes; the seconds it took, or a negative number with bnncc_error set. */
double timed_run(Instance *instance);

#endif
