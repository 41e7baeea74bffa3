/* What the driver asks about the machine. */
#ifndef BNNCC_CPU_H
#define BNNCC_CPU_H

#include <stddef.h>

/* Whether this machine lacks one of the required features: words of /proc/cpuinfo, separated by spaces; the first such
 * word is copied. On x86-64 the processor is asked, and the system whether it saves the registers; elsewhere the file,
 * and the answer is 0 where that lists nothing, as under qemu-user on another architecture. */
int cpu_lacks(const char *required, char *missing, size_t size);

/* CPUs that this process may run on, at least 1. */
int cpu_count(void);

/* Physical cores among them, at most as many as the control group's CPU quota allows, at least 1. */
int cpu_default_threads(void);

#endif
