// Bytes that are read by position: of a file that stays open, or of memory.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct file {
    const char *name; // for messages
    int handle;       // -1: in memory
    const unsigned char *bytes;
    uint64_t size;
};

struct file file_open(const char *path); // fails with UNUSABLE
struct file file_in_memory(const char *name, const void *bytes, size_t size);
// All of `size` bytes; fails with UNUSABLE where the file ends before.
void file_read(const struct file *file, uint64_t offset, void *target, size_t size);
void file_close(struct file *file);
// A whole file; fails with UNUSABLE if it is longer than `most`, or cannot be read.
unsigned char *file_whole(const char *path, size_t most, size_t *size);

uint32_t crc32_of(const void *data, size_t size); // as in ZIP archives
static inline uint32_t little32(const unsigned char *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}
static inline uint16_t little16(const unsigned char *p) { return (uint16_t)(p[0] | p[1] << 8); }
// Replace a file as a whole; `durable`: it is on the disk before this returns. Fails with TARGET.
void file_replace(const char *path, const void *bytes, size_t size, bool durable);
void write_all(int handle, const void *bytes, size_t size); // fails with TARGET
void folder_sync(const char *folder); // have its entries on the disk; fails with TARGET
