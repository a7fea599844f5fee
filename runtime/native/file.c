#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fail.h"
#include "memory.h"

struct file file_open(const char *path) {
    int handle = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // a pipe would wait
    struct stat facts;
    if (handle < 0)
        fail(UNUSABLE, "cannot open '%s': %s", path, system_error());
    if (fstat(handle, &facts) || !S_ISREG(facts.st_mode)) {
        close(handle);
        fail(UNUSABLE, "cannot open %s: not a file", path);
    }
    return (struct file){path, handle, NULL, (uint64_t)facts.st_size};
}

struct file file_in_memory(const char *name, const void *bytes, size_t size) {
    return (struct file){name, -1, bytes, size};
}

void file_read(const struct file *file, uint64_t offset, void *target, size_t size) {
    if (offset > file->size || size > file->size - offset)
        fail(UNUSABLE, "%s: the file ends early", file->name);
    if (file->handle < 0) {
        if (size)
            memcpy(target, file->bytes + offset, size);
        return;
    }
    char *out = target;
    while (size) {
        ssize_t got = pread(file->handle, out, size, (off_t)offset);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            fail(UNUSABLE, "%s: %s", file->name, got ? system_error() : "the file ends early");
        out += got;
        offset += (uint64_t)got;
        size -= (size_t)got;
    }
}

void file_close(struct file *file) {
    if (file->handle >= 0)
        close(file->handle);
    file->handle = -1;
}

unsigned char *file_whole(const char *path, size_t most, size_t *size) {
    struct file file = file_open(path);
    if (file.size > most) {
        file_close(&file);
        fail(UNUSABLE, "%s is longer than %zu bytes", path, most);
    }
    unsigned char *bytes = take(file.size + 1);
    file_read(&file, 0, bytes, file.size);
    *size = file.size;
    file_close(&file);
    return bytes;
}

uint32_t crc32_of(const void *data, size_t size) {
    static const uint32_t table[16] = {
        0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158,
        0x5005713c, 0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4,
        0xa00ae278, 0xbdbdf21c}; // of half a byte, polynomial 0xedb88320
    const unsigned char *p = data;
    uint32_t crc = 0xffffffff;
    while (size--) {
        crc ^= *p++;
        crc = crc >> 4 ^ table[crc & 15];
        crc = crc >> 4 ^ table[crc & 15];
    }
    return ~crc;
}

void write_all(int handle, const void *bytes, size_t size) {
    const char *p = bytes;
    while (size) {
        ssize_t put = write(handle, p, size);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            fail(TARGET, "%s", errno == ENOSPC || errno == EDQUOT
                                   ? "the disk there is full; edgekit gc removes older versions"
                                   : system_error());
        p += put;
        size -= (size_t)put;
    }
}

void file_replace(const char *path, const void *bytes, size_t size, bool durable) {
    const char *slash = strrchr(path, '/');
    char *folder = slash ? take_text(path, (size_t)(slash - path)) : ".";
    char *temporary = take_format("%s/.new-%s", folder, slash ? slash + 1 : path);
    int handle = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (handle < 0)
        fail(TARGET, "cannot write %s: %s", path, system_error());
    struct trap trap;
    trap_open(&trap);
    if (setjmp(trap.here)) {
        close(handle);
        unlink(temporary);
        fail_again(&trap.fault);
    }
    fchmod(handle, 0644); // what root installs, a service user reads
    write_all(handle, bytes, size);
    if (fsync(handle) || rename(temporary, path))
        fail(TARGET, "cannot write %s: %s", path, system_error());
    trap_close(&trap);
    close(handle);
    if (durable)
        folder_sync(folder);
}

void folder_sync(const char *folder) {
    int handle = open(folder, O_RDONLY | O_CLOEXEC);
    bool done = handle >= 0 && !fsync(handle);
    if (handle >= 0)
        close(handle);
    if (!done)
        fail(TARGET, "cannot sync %s: %s", folder, system_error());
}
