#include "machine.h"

#include <glob.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>

#include "clock.h"
#include "memory.h"

const char *machine_name(void) {
    static struct utsname found;
    uname(&found);
    return !strcmp(found.machine, "arm64") ? "aarch64" : found.machine;
}

// The first value of a key in a file of `key: value` lines; NULL without.
static const char *value_in(const char *path, const char *key) {
    char line[1024], *found = NULL;
    FILE *file = fopen(path, "re");
    if (!file)
        return NULL;
    while (!found && fgets(line, sizeof line, file)) {
        size_t length = strlen(key);
        if (strncmp(line, key, length))
            continue;
        char *colon = line + length + strspn(line + length, " \t");
        if (*colon != ':')
            continue;
        colon += 1 + strspn(colon + 1, " \t");
        colon[strcspn(colon, "\n")] = 0;
        found = take_text(colon, strlen(colon));
    }
    fclose(file);
    return found;
}

const char *machine_cpu_name(void) {
    static const char path[] = "/proc/cpuinfo";
    const char *maker = value_in(path, "CPU implementer"), *part = value_in(path, "CPU part");
    if (maker && part)
        return take_format("implementer %s part %s", maker, part);
    const char *name = value_in(path, "model name");
    return name ? name : value_in(path, "cpu model");
}

static int64_t kilobytes(const char *path, const char *key) {
    void *mark = memory_mark();
    const char *found = value_in(path, key);
    int64_t bytes = found ? strtoll(found, NULL, 10) * 1024 : -1;
    memory_release(mark);
    return bytes;
}

int64_t machine_rss_bytes(void) { return kilobytes("/proc/self/status", "VmRSS"); }

int64_t machine_peak_rss_bytes(void) {
    int64_t peak = kilobytes("/proc/self/status", "VmHWM");
    return peak < 0 ? 0 : peak;
}

static int64_t number_in(const char *path) {
    long long found;
    FILE *file = fopen(path, "re");
    if (!file)
        return -1;
    int count = fscanf(file, "%lld", &found);
    fclose(file);
    return count == 1 ? found : -1;
}

// What the control group (version 2) leaves, -1 without a limit.
static int64_t group_leaves(void) {
    char line[512];
    FILE *file = fopen("/proc/self/cgroup", "re");
    if (!file)
        return -1;
    char *own = NULL;
    while (fgets(line, sizeof line, file))
        own = strstr(line, "::");
    fclose(file);
    if (!own)
        return -1;
    own[strcspn(own, "\n")] = 0;
    int64_t limit = number_in(take_format("/sys/fs/cgroup%s/memory.max", own + 2));
    int64_t used = number_in(take_format("/sys/fs/cgroup%s/memory.current", own + 2));
    return limit < 0 || used < 0 ? -1 : limit > used ? limit - used : 0;
}

int64_t machine_free_memory_bytes(void) {
    void *mark = memory_mark();
    int64_t free_bytes = kilobytes("/proc/meminfo", "MemAvailable"), group = group_leaves();
    memory_release(mark);
    return group >= 0 && (free_bytes < 0 || group < free_bytes) ? group : free_bytes;
}

// The largest or the mean of what these files hold; NAN where there are none.
static double numbers_in(const char *pattern, bool largest) {
    glob_t found;
    double sum = 0, most = -INFINITY;
    int count = 0;
    if (glob(pattern, 0, NULL, &found))
        return NAN;
    for (size_t i = 0; i < found.gl_pathc; i++) {
        double value = (double)number_in(found.gl_pathv[i]);
        if (value == -1)
            continue; // a sensor that is asleep
        count++;
        sum += value;
        most = value > most ? value : most;
    }
    globfree(&found);
    return !count ? NAN : largest ? most : sum / count;
}

struct reading machine_read(void) {
    return (struct reading){
        clock_ns(), clock_cpu_ns(), machine_rss_bytes(),
        numbers_in("/sys/class/thermal/thermal_zone*/temp", true) / 1000,
        numbers_in("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq", false) / 1000};
}

static void bytes_to_json(struct text *text, const char *name, int64_t value) {
    if (value < 0)
        text_json_member(text, name, NULL);
    else
        text_json_member_integer(text, name, value);
}

static void pair_to_json(struct text *text, const char *name, double before, double after) {
    text_json_key(text, name);
    text_add(text, "{", 1);
    text_json_member_number(text, "before", before);
    text_json_member_number(text, "after", after);
    text_add(text, "}", 1);
}

void machine_to_json(struct text *text, const struct reading *before, const struct reading *after) {
    text_json_member_integer(text, "cpu_ns", after->cpu_ns - before->cpu_ns);
    text_json_member_integer(text, "wall_ns", after->wall_ns - before->wall_ns);
    text_json_member(text, "energy_j", NULL); // phones say it in other ways, or not at all
    text_json_key(text, "rss_bytes");
    text_add(text, "{", 1);
    bytes_to_json(text, "before", before->rss_bytes);
    bytes_to_json(text, "after", after->rss_bytes);
    text_add(text, "}", 1);
    pair_to_json(text, "temperature_c", before->temperature_c, after->temperature_c);
    pair_to_json(text, "frequency_mhz", before->frequency_mhz, after->frequency_mhz);
}

void machine_memory_to_json(struct text *text) {
    static const char status[] = "/proc/self/status";
    text_add(text, "{", 1);
    bytes_to_json(text, "rss", machine_rss_bytes());
    bytes_to_json(text, "anonymous", kilobytes(status, "RssAnon"));
    bytes_to_json(text, "file", kilobytes(status, "RssFile"));
    bytes_to_json(text, "pss", kilobytes("/proc/self/smaps_rollup", "Pss"));
    bytes_to_json(text, "peak", machine_peak_rss_bytes());
    text_add(text, "}", 1);
}
