// Where bundles are installed on a device, and how that is changed: `edgekit_runtime.place`.
//
//     ROOT/NAME/versions/<sequence>-<id>.edgekit never changed once there
//     ROOT/NAME/index/<the same>.json            its chunks: what need not be sent again
//     ROOT/NAME/active.json                      {"schema", "file", "previous"}, replaced whole
//     ROOT/NAME/journal.json                     the step an installation has come to
//     ROOT/NAME/incoming/<sha256>.part           a bundle on its way
//     ROOT/NAME/tries.json                       how often a bundle failed its trial
//     ROOT/NAME/.lock                            held by who changes anything
//     ROOT/.device/capsule-<hash>/               this program and its libraries
//
// All functions fail with TARGET where the disk does not do what is wanted.
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "json.h"
#include "manifest.h"

struct place {
    char *name, *root, *folder, *versions, *index, *incoming, *active, *journal, *tries;
    int lock; // -1: not held
};

struct state { // versions, NULL where there is none
    char *active, *previous;
};

bool is_name(const char *text);
bool is_version(const char *file); // <sequence>-<id>.edgekit
bool is_hash(const char *text);
int compare_sequences(const char *one, const char *other); // of versions
char *version_of(const struct manifest *manifest); // fails with UNUSABLE if it makes no file name

struct place *place_of(const char *root, const char *name);
void place_make(struct place *place); // its folders, on the disk
// Taken until this process ends; fails with TARGET if another has it, and names who that is.
void place_lock(struct place *place, const char *owner, bool beats);
// The host lives; `ahead_s`: and what is done next lets nothing be heard for so long.
void place_heard(struct place *place, double ahead_s);
struct state place_state(const struct place *place);
void place_switch(const struct place *place, const char *file, const char *previous);
void place_activate(const struct place *place, const char *file);
void place_keep(const struct place *place, const char *part, const char *file);
// Whether a version is there, whole; `between` as with `hash_of`.
bool place_holds(const struct place *place, const char *file, const char *sha256,
                 void (*between)(void));
struct names place_installed(const struct place *place); // oldest sequence first
void place_clear(const struct place *place, const char *keep); // NULL: no part
void place_done(const struct place *place);
void place_note(const struct place *place, const char *step, const char *file, const char *sha256);
struct json *place_tries(const struct place *place);
void place_write_tries(const struct place *place, const char *sha256, int64_t count, const char *why);

struct json *json_file(const char *path); // an object, empty if it is missing or damaged
struct names folder_names(const char *folder); // sorted, empty if it is missing
bool exists(const char *path);
int64_t size_of(const char *path); // -1 without
void make_folders(const char *path);
void remove_file(const char *path);
void remove_tree(const char *path);
// The SHA-256 of a file, or of a piece of it (`size` -1: to its end); "" where it cannot be read.
// `between` is called now and then, NULL: nothing is.
const char *hash_of(const char *path, int64_t offset, int64_t size, void (*between)(void));
