/* What the driver asks about the machine. */
#ifndef BNNCC_CPU_H
#define BNNCC_CPU_H

#include <stddef.h>

/* Whether one of the required words (separated by spaces) is absent from the features of /proc/cpuinfo; the first
 * such word is copied. 0 where the file lists none, as under qemu-user for another architecture. */
int cpu_lacks(const char *required, char *missing, size_t size);

/* CPUs that this process may run on, at least 1. */
int cpu_count(void);

/* Physical cores among them, at most as many as the control group's CPU quota allows, at least 1. */
int cpu_default_threads(void);

#endif
