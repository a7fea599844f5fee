#include "bundle.h"

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "fail.h"
#include "inflate.h"
#include "memory.h"
#include "sha256.h"

enum {
    LOCAL = 30, CENTRAL = 46, END = 22, // bytes of ZIP's headers
    MAX_ENTRIES = 4096, MAX_PATH = 255, MAX_MANIFEST = 4 << 20, PIECE = 1 << 20,
    DEFLATED = 8, MAX_INFLATION = 64, // times larger than in the archive; DEFLATE could do 1032
};
static const uint64_t MAX_BUNDLE = ((uint64_t)4 << 30) - (1 << 20);
static const char MANIFEST[] = "manifest.json";

struct entry {
    char *path;
    uint32_t method, stored, size, crc32, offset;
};

static bool safe_path(const char *path, size_t length) {
    static const char letters[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._+-";
    if (!length || length > MAX_PATH)
        return false;
    bool start = true; // of a part
    for (size_t i = 0; i < length; i++) {
        if (start && (path[i] == '.' || path[i] == '/'))
            return false;
        if (path[i] != '/' && (!path[i] || !strchr(letters, path[i])))
            return false;
        start = path[i] == '/';
    }
    return !start;
}

static unsigned char *put16(unsigned char *p, uint32_t value) {
    p[0] = (unsigned char)value;
    p[1] = (unsigned char)(value >> 8);
    return p + 2;
}

static unsigned char *put32(unsigned char *p, uint32_t value) {
    return put16(put16(p, value & 0xffff), value >> 16);
}

// What local and central headers share: flags to the length of the extra field.
static unsigned char *put_facts(unsigned char *p, const struct entry *entry) {
    p = put16(put16(put16(p, 0), entry->method), 0);
    p = put16(p, 0x21); // 1980-01-01, the zero of DOS dates
    p = put32(put32(put32(p, entry->crc32), entry->stored), entry->size);
    return put16(put16(p, (uint32_t)strlen(entry->path)), 0);
}

static void read_entry(struct entry *entry, const unsigned char *p, size_t left) {
    if (left < CENTRAL || memcmp(p, "PK\1\2", 4))
        fail(UNUSABLE, "not a bundle: the archive's directory is damaged");
    uint32_t length = little16(p + 28);
    if (left - CENTRAL < length || !safe_path((const char *)p + CENTRAL, length))
        fail(UNUSABLE, "refused the path '%.*s': not a plain relative path",
             (int)(length < 80 && length <= left - CENTRAL ? length : 0), (const char *)p + CENTRAL);
    entry->path = take_text((const char *)p + CENTRAL, length);
    entry->method = little16(p + 10);
    entry->crc32 = little32(p + 16);
    entry->stored = little32(p + 20);
    entry->size = little32(p + 24);
    entry->offset = little32(p + 42);
    if ((little32(p + 38) >> 16 & 0170000) == 0120000)
        fail(UNUSABLE, "%s is a link; only plain files are allowed", entry->path);
    if (little16(p + 30))
        fail(UNUSABLE, "the archive is not canonical at '%s'", entry->path);
}

static void compare_headers(struct bundle *bundle, const unsigned char *directory,
                            uint32_t length, uint32_t start) {
    unsigned char made[CENTRAL + MAX_PATH], found[LOCAL + MAX_PATH];
    uint64_t offset = 0;
    uint32_t at = 0;
    for (size_t i = 0; i < bundle->entries; i++) {
        const struct entry *one = &bundle->entry[i];
        size_t named = strlen(one->path);
        memcpy(made, "PK\3\4", 4);
        memcpy(put_facts(put16(made + 4, 20), one), one->path, named);
        if (one->offset != offset || offset + LOCAL + named > bundle->file.size)
            fail(UNUSABLE, "the archive is damaged or not canonical at '%s'", one->path);
        file_read(&bundle->file, offset, found, LOCAL + named);
        if (memcmp(found, made, LOCAL + named))
            fail(UNUSABLE, "the archive is damaged or not canonical at '%s'", one->path);
        memcpy(made, "PK\1\2\24\3\24\0", 8); // version 2.0, made on Unix
        unsigned char *p = put16(put16(put_facts(made + 8, one), 0), 0);
        p = put32(put32(put16(p, 0), (uint32_t)0100644 << 16), one->offset);
        memcpy(p, one->path, named);
        if (at + CENTRAL + named > length || memcmp(directory + at, made, CENTRAL + named))
            fail(UNUSABLE, "the archive's directory is damaged or not canonical");
        at += (uint32_t)(CENTRAL + named);
        offset += LOCAL + named + one->stored;
        if (offset > start)
            fail(UNUSABLE, "%s is said to be larger than the whole bundle", one->path);
    }
    if (offset != start || at != length)
        fail(UNUSABLE, "the archive's directory is damaged or not canonical");
}

static void read_directory(struct bundle *bundle) {
    unsigned char end[END], wanted[END];
    uint64_t size = bundle->file.size;
    if (!size)
        fail(UNUSABLE, "the file is empty");
    if (size > MAX_BUNDLE)
        fail(UNUSABLE, "%llu bytes, at most %llu are allowed", (unsigned long long)size,
             (unsigned long long)MAX_BUNDLE);
    if (size < END)
        fail(UNUSABLE, "not a bundle: no canonical archive ends here; it may be cut off");
    file_read(&bundle->file, size - END, end, END);
    if (memcmp(end, "PK\5\6", 4))
        fail(UNUSABLE, "not a bundle: no canonical archive ends here; it may be cut off");
    uint32_t count = little16(end + 10), length = little32(end + 12), start = little32(end + 16);
    if ((uint64_t)start + length + END != size)
        fail(UNUSABLE, "not a bundle: the archive is damaged or not canonical");
    if (count > MAX_ENTRIES)
        fail(UNUSABLE, "%u files, at most %d are allowed", count, MAX_ENTRIES);
    if (length > count * (uint32_t)(CENTRAL + MAX_PATH))
        fail(UNUSABLE, "the archive's directory is damaged or not canonical");
    memcpy(wanted, "PK\5\6\0\0\0\0", 8);
    put16(put32(put32(put16(put16(wanted + 8, count), count), length), start), 0);
    if (memcmp(end, wanted, END))
        fail(UNUSABLE, "the archive's directory is damaged or not canonical");
    unsigned char *directory = take(length + 1);
    file_read(&bundle->file, start, directory, length);
    bundle->entries = count;
    bundle->entry = take_array(count, sizeof *bundle->entry);
    uint32_t at = 0;
    for (uint32_t i = 0; i < count; i++) {
        read_entry(&bundle->entry[i], directory + at, length - at);
        at += (uint32_t)(CENTRAL + strlen(bundle->entry[i].path));
        for (uint32_t j = 0; j < i; j++)
            if (!strcmp(bundle->entry[i].path, bundle->entry[j].path))
                fail(UNUSABLE, "the file '%s' is in the archive twice", bundle->entry[i].path);
    }
    compare_headers(bundle, directory, length, start);
}

static uint64_t data_offset(const struct entry *entry) {
    return (uint64_t)entry->offset + LOCAL + strlen(entry->path);
}

static void read_manifest(struct bundle *bundle) {
    if (!bundle->entries || strcmp(bundle->entry[0].path, MANIFEST))
        fail(UNUSABLE, "no %s at its start: not an EdgeKit bundle", MANIFEST);
    const struct entry *entry = &bundle->entry[0];
    if (entry->method || entry->stored != entry->size)
        fail(UNUSABLE, "%s is compressed; it must be stored as it is", MANIFEST);
    if (entry->size > MAX_MANIFEST)
        fail(UNUSABLE, "%s has %u bytes, at most 4 MiB are allowed", MANIFEST, entry->size);
    char *bytes = take(entry->size + (size_t)1);
    file_read(&bundle->file, data_offset(entry), bytes, entry->size);
    if (crc32_of(bytes, entry->size) != entry->crc32)
        fail(UNUSABLE, "%s is damaged: its checksum differs", MANIFEST);
    bundle->manifest_text = bytes;
    bundle->manifest_size = entry->size;
    bundle->manifest = manifest_parse(bytes, entry->size);
}

static void check_listing(struct bundle *bundle) {
    const struct manifest *manifest = bundle->manifest;
    if (manifest->files + 1 != bundle->entries)
        fail(UNUSABLE, "the archive has %zu files, the manifest lists %zu", bundle->entries - 1,
             manifest->files);
    for (size_t i = 0; i < manifest->files; i++) {
        const struct file_entry *wanted = &manifest->file[i];
        const struct entry *found = &bundle->entry[i + 1];
        if (strcmp(found->path, wanted->path))
            fail(UNUSABLE, "the file '%s' is where '%s' should be: the files are not those of %s",
                 found->path, wanted->path, MANIFEST);
        if (found->size != wanted->size)
            fail(UNUSABLE, "%s has %u bytes, the manifest says %llu", found->path, found->size,
                 (unsigned long long)wanted->size);
        if (found->method != (wanted->packed_sha256 ? DEFLATED : 0) ||
            found->stored != wanted->packed_size)
            fail(UNUSABLE, "%s is compressed other than the manifest says", found->path);
        if (found->size > (uint64_t)MAX_INFLATION * found->stored)
            fail(UNUSABLE, "%s would be over %d times larger, inflated", found->path, MAX_INFLATION);
        if (found->crc32 != wanted->crc32)
            fail(UNUSABLE, "%s has another CRC-32 in the archive than in the manifest", found->path);
    }
}

struct bundle *bundle_of(struct file file) {
    struct bundle *bundle = take(sizeof *bundle);
    bundle->path = file.name;
    bundle->file = file;
    read_directory(bundle);
    read_manifest(bundle);
    check_listing(bundle);
    return bundle;
}

struct bundle *bundle_open(const char *path) {
    struct file file = file_open(path);
    struct trap trap;
    trap_open(&trap);
    if (setjmp(trap.here)) {
        file_close(&file);
        fail(trap.fault.code, "%s: %s", path, trap.fault.text);
    }
    struct bundle *bundle = bundle_of(file);
    trap_close(&trap);
    return bundle;
}

void bundle_close(struct bundle *bundle) { file_close(&bundle->file); }

static void compare(const struct bundle *bundle, const char *path, const char *wanted,
                    struct sha256 *hash) {
    char found[65];
    sha256_end(hash, found);
    if (strcmp(found, wanted))
        fail(UNUSABLE, "%s: %s is damaged: SHA-256 %.12s..., the manifest says %.12s...; copy the "
             "bundle again", bundle->path, path, found, wanted);
}

// All of what lies in the archive at once, compared with its hash.
static unsigned char *stored_bytes(struct bundle *bundle, size_t i) {
    const struct file_entry *wanted = &bundle->manifest->file[i];
    unsigned char *bytes = take(wanted->packed_size + 1);
    struct sha256 hash;
    file_read(&bundle->file, data_offset(&bundle->entry[i + 1]), bytes, wanted->packed_size);
    sha256_begin(&hash);
    sha256_add(&hash, bytes, wanted->packed_size);
    const char *digest = wanted->packed_sha256 ? wanted->packed_sha256 : wanted->sha256;
    compare(bundle, wanted->path, digest, &hash);
    return bytes;
}

static unsigned char *inflated_bytes(struct bundle *bundle, size_t i) {
    const struct file_entry *wanted = &bundle->manifest->file[i];
    unsigned char *bytes = take(wanted->size + 1);
    void *mark = memory_mark();
    struct sha256 hash;
    if (!inflate(stored_bytes(bundle, i), wanted->packed_size, bytes, wanted->size))
        fail(UNUSABLE, "%s: %s is damaged: it inflates to other sizes", bundle->path, wanted->path);
    memory_release(mark);
    sha256_begin(&hash);
    sha256_add(&hash, bytes, wanted->size);
    compare(bundle, wanted->path, wanted->sha256, &hash);
    return bytes;
}

unsigned char *bundle_read(struct bundle *bundle, const char *path, size_t *size) {
    for (size_t i = 0; i < bundle->manifest->files; i++) {
        const struct file_entry *wanted = &bundle->manifest->file[i];
        if (strcmp(wanted->path, path))
            continue;
        *size = wanted->size;
        return wanted->packed_sha256 ? inflated_bytes(bundle, i) : stored_bytes(bundle, i);
    }
    fail(UNUSABLE, "%s: no file '%s' in this bundle", bundle->path, path);
}

static void verify_stored(struct bundle *bundle, size_t i, unsigned char *piece) {
    const struct file_entry *wanted = &bundle->manifest->file[i];
    uint64_t at = data_offset(&bundle->entry[i + 1]), left = wanted->size;
    struct sha256 hash;
    sha256_begin(&hash);
    while (left) {
        size_t part = left < PIECE ? left : PIECE;
        file_read(&bundle->file, at, piece, part);
        sha256_add(&hash, piece, part);
        at += part;
        left -= part;
    }
    compare(bundle, wanted->path, wanted->sha256, &hash);
}

void bundle_verify(struct bundle *bundle) {
    void *mark = memory_mark();
    unsigned char *piece = take(PIECE);
    for (size_t i = 0; i < bundle->manifest->files; i++) {
        void *here = memory_mark();
        if (bundle->manifest->file[i].packed_sha256)
            inflated_bytes(bundle, i);
        else
            verify_stored(bundle, i, piece);
        memory_release(here);
    }
    memory_release(mark);
}

bool is_bundle(const char *path) {
    size_t length = strlen(path);
    if (length >= 8 && !strcmp(path + length - 8, ".edgekit"))
        return true;
    unsigned char head[LOCAL + sizeof MANIFEST - 1];
    int handle = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (handle < 0)
        return false;
    bool whole = read(handle, head, sizeof head) == (ssize_t)sizeof head;
    close(handle);
    return whole && !memcmp(head, "PK\3\4", 4) && !memcmp(head + LOCAL, MANIFEST, sizeof MANIFEST - 1);
}
