#define _GNU_SOURCE
#include "cpu.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int has_word(const char *line, const char *word, size_t length) {
  for (const char *at = line; (at = strstr(at, word)); at += length)
    if (at > line && at[-1] == ' ' && strchr(" \n", at[length])) return 1;
  return 0;
}

int cpu_lacks(const char *required, char *missing, size_t size) {
  FILE *file = fopen("/proc/cpuinfo", "r");
  char *line = NULL;
  size_t capacity = 0;
  int found = 0;
  if (!file) return 0;
#if defined(__x86_64__) || defined(__i386__)
  static const char key[] = "flags";
#else
  static const char key[] = "Features";
#endif
  while (!found && getline(&line, &capacity, file) > 0) found = !strncmp(line, key, sizeof key - 1);
  fclose(file);
  int lacking = 0;
  while (found && !lacking && *required) {
    char word[64];
    size_t length = strcspn(required, " ");
    snprintf(word, sizeof word, "%.*s", (int)length, required);
    if (length && !has_word(line, word, strlen(word))) {
      snprintf(missing, size, "%s", word);
      lacking = 1;
    }
    required += length + strspn(required + length, " ");
  }
  free(line);
  return lacking;
}

/* The CPUs of this process; without an answer from the system, as if there were one. */
static cpu_set_t allowed(void) {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  if (sched_getaffinity(0, sizeof cpus, &cpus) || !CPU_COUNT(&cpus)) CPU_SET(0, &cpus);
  return cpus;
}

int cpu_count(void) {
  cpu_set_t cpus = allowed();
  return CPU_COUNT(&cpus);
}

/* The lowest-numbered CPU that shares a core with this one. */
static int first_sibling(int cpu) {
  char path[96];
  int first = cpu;
  snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
  FILE *file = fopen(path, "r");
  if (!file) return cpu;
  if (fscanf(file, "%d", &first) != 1 || first < 0 || first >= CPU_SETSIZE) first = cpu;
  fclose(file);
  return first;
}

/* CPUs' worth of time that the control group grants, rounded up; 0 without a limit. */
static int quota(void) {
  long long granted = 0, period = 0;
  FILE *file = fopen("/sys/fs/cgroup/cpu.max", "r");
  if (!file) return 0;
  if (fscanf(file, "%lld %lld", &granted, &period) != 2) granted = 0; /* "max" */
  fclose(file);
  return granted > 0 && period > 0 ? (int)((granted + period - 1) / period) : 0;
}

int cpu_default_threads(void) {
  cpu_set_t cpus = allowed(), cores;
  CPU_ZERO(&cores);
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
    if (CPU_ISSET(cpu, &cpus)) CPU_SET(first_sibling(cpu), &cores);
  int count = CPU_COUNT(&cores), limit = quota();
  return limit && limit < count ? limit : count;
}
