#define _GNU_SOURCE
#include "cpu.h"

#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>

/* CPUID and XGETBV, not /proc/cpuinfo: qemu-user shows the file of the machine it runs on. */
enum { LEAF_1, LEAF_7_0, LEAF_7_1, LEAF_80000001, LEAVES };
enum { EAX, EBX, ECX, EDX, REGISTERS };
enum { ANY, YMM = 0x06, ZMM = 0xe6 }; /* what the system must save of a thread: bits of XCR0 */

/* Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E. Words as in the kernel's cpufeatures.h. */
static const struct {
  char word[20];
  uint8_t leaf, reg, bit, saved;
} known[] = {
    {"pni", LEAF_1, ECX, 0, ANY},
    {"ssse3", LEAF_1, ECX, 9, ANY},
    {"fma", LEAF_1, ECX, 12, YMM},
    {"cx16", LEAF_1, ECX, 13, ANY},
    {"sse4_1", LEAF_1, ECX, 19, ANY},
    {"sse4_2", LEAF_1, ECX, 20, ANY},
    {"movbe", LEAF_1, ECX, 22, ANY},
    {"popcnt", LEAF_1, ECX, 23, ANY},
    {"xsave", LEAF_1, ECX, 27, ANY}, /* switched on by the system */
    {"avx", LEAF_1, ECX, 28, YMM},
    {"f16c", LEAF_1, ECX, 29, YMM},
    {"bmi1", LEAF_7_0, EBX, 3, ANY},
    {"avx2", LEAF_7_0, EBX, 5, YMM},
    {"bmi2", LEAF_7_0, EBX, 8, ANY},
    {"avx512f", LEAF_7_0, EBX, 16, ZMM},
    {"avx512dq", LEAF_7_0, EBX, 17, ZMM},
    {"avx512ifma", LEAF_7_0, EBX, 21, ZMM},
    {"avx512cd", LEAF_7_0, EBX, 28, ZMM},
    {"avx512bw", LEAF_7_0, EBX, 30, ZMM},
    {"avx512vl", LEAF_7_0, EBX, 31, ZMM},
    {"avx512vbmi", LEAF_7_0, ECX, 1, ZMM},
    {"avx512_vbmi2", LEAF_7_0, ECX, 6, ZMM},
    {"gfni", LEAF_7_0, ECX, 8, ANY},
    {"avx512_vnni", LEAF_7_0, ECX, 11, ZMM},
    {"avx512_bitalg", LEAF_7_0, ECX, 12, ZMM},
    {"avx512_vpopcntdq", LEAF_7_0, ECX, 14, ZMM},
    {"avx_vnni", LEAF_7_1, EAX, 4, YMM},
    {"avx512_bf16", LEAF_7_1, EAX, 5, ZMM},
    {"lahf_lm", LEAF_80000001, ECX, 0, ANY},
    {"abm", LEAF_80000001, ECX, 5, ANY},
};

typedef struct {
  uint32_t leaves[LEAVES][REGISTERS];
  uint32_t saved; /* XCR0 */
} Features;

static int read_features(Features *features) {
  static const uint32_t numbers[LEAVES][2] = {{1, 0}, {7, 0}, {7, 1}, {0x80000001, 0}};
  memset(features, 0, sizeof *features);
  for (int i = 0; i < LEAVES; i++) {
    uint32_t *leaf = features->leaves[i]; /* stays 0 where the CPU does not know it */
    __get_cpuid_count(numbers[i][0], numbers[i][1], &leaf[EAX], &leaf[EBX], &leaf[ECX], &leaf[EDX]);
  }
  uint32_t high;
  if (features->leaves[LEAF_1][ECX] >> 27 & 1) __asm__("xgetbv" : "=a"(features->saved), "=d"(high) : "c"(0));
  return 1;
}

static int has_feature(const Features *features, const char *word) {
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (!strcmp(known[i].word, word))
      return features->leaves[known[i].leaf][known[i].reg] >> known[i].bit & 1 &&
             (features->saved & known[i].saved) == known[i].saved;
  return 0;
}

static void free_features(Features *features) { (void)features; }
#else
typedef struct {
  char *line; /* of /proc/cpuinfo */
} Features;

static int read_features(Features *features) {
  static const char key[] = "Features";
  FILE *file = fopen("/proc/cpuinfo", "r");
  size_t capacity = 0;
  int found = 0;
  features->line = NULL;
  if (!file) return 0;
  while (!found && getline(&features->line, &capacity, file) > 0)
    found = !strncmp(features->line, key, sizeof key - 1);
  fclose(file);
  return found;
}

static int has_word(const char *line, const char *word) {
  size_t length = strlen(word);
  for (const char *at = line; (at = strstr(at, word)); at += length)
    if (at > line && at[-1] == ' ' && strchr(" \n", at[length])) return 1;
  return 0;
}

static int has_feature(const Features *features, const char *word) {
  static const char *const implied[] = {"neon", "vfpv4", "idiva"};
  /* A 64-bit kernel tells 32-bit processes its own words; these came with the first of them. */
  if (has_word(features->line, "asimd"))
    for (size_t i = 0; i < sizeof implied / sizeof *implied; i++)
      if (!strcmp(implied[i], word)) return 1;
  return has_word(features->line, word);
}

static void free_features(Features *features) { free(features->line); }
#endif

int cpu_lacks(const char *required, char *missing, size_t size) {
  Features features;
  int answered = read_features(&features), lacking = 0;
  while (answered && !lacking && *required) {
    char word[64];
    size_t length = strcspn(required, " ");
    snprintf(word, sizeof word, "%.*s", (int)length, required);
    if (length && !has_feature(&features, word)) {
      snprintf(missing, size, "%s", word);
      lacking = 1;
    }
    required += length + strspn(required + length, " ");
  }
  free_features(&features);
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
