#include "child.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "clock.h"
#include "fail.h"
#include "file.h"
#include "memory.h"
#include "wire.h"

enum { PIECE = 1 << 16, MAX_SAID = 64 << 20, WORDS = 4000, CODE_WAIT_MS = 5000 };

struct child {
    pid_t pid; // 0: it has ended
    int in, out, words, status;
    char *pending;
    size_t length, room;
    bool over;
};

static char **texts_of(const struct json *list) {
    char **texts = take_array(list->length + 1, sizeof(char *));
    for (size_t i = 0; i < list->length; i++) {
        if (list->items[i].kind != J_TEXT)
            fail(UNUSABLE, "a command has a word that is no text");
        texts[i] = list->items[i].text;
    }
    return texts;
}

static void become(char **command, const struct json *environment, const struct json *cpus,
                   const int streams[3], int report) {
    setpgid(0, 0);
    for (int i = 0; i < 3; i++)
        dup2(streams[i], i);
    for (size_t i = 0; environment && i < environment->length; i++)
        if (environment->items[i].kind == J_TEXT)
            setenv(environment->keys[i].text, environment->items[i].text, 1);
    if (cpus && cpus->length) {
        cpu_set_t set;
        CPU_ZERO(&set);
        for (size_t i = 0; i < cpus->length; i++)
            if (cpus->items[i].integer >= 0 && cpus->items[i].integer < CPU_SETSIZE)
                CPU_SET((size_t)cpus->items[i].integer, &set);
        sched_setaffinity(0, sizeof set, &set);
    }
    signal(SIGPIPE, SIG_DFL);
    execvp(command[0], command);
    int why = errno;
    ssize_t put = write(report, &why, sizeof why);
    (void)put;
    _exit(127);
}

struct child *child_start(const struct json *command, const struct json *environment,
                          const struct json *cpus) {
    int in[2], out[2], report[2], why = 0;
    if (!command || command->kind != J_LIST || !command->length)
        fail(UNUSABLE, "a request without a command");
    char **words = texts_of(command);
    if (environment && environment->kind != J_OBJECT)
        environment = NULL;
    if (cpus && cpus->kind != J_LIST)
        cpus = NULL;
    int said = memfd_create("words", MFD_CLOEXEC);
    if (said < 0 || pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC) || pipe2(report, O_CLOEXEC))
        fail(TARGET, "cannot start a process: %s", system_error());
    pid_t pid = fork();
    if (!pid)
        become(words, environment, cpus, (int[]){in[0], out[1], said}, report[1]);
    close(in[0]);
    close(out[1]);
    close(report[1]);
    bool started = pid > 0 && read(report[0], &why, sizeof why) != (ssize_t)sizeof why;
    close(report[0]);
    if (!started) {
        if (pid > 0)
            waitpid(pid, NULL, 0);
        close(in[1]);
        close(out[0]);
        close(said);
        fail(TARGET, "%s: %s", words[0], strerror(why ? why : EAGAIN));
    }
    setpgid(pid, pid);
    struct child *child = calloc(1, sizeof *child);
    if (!child)
        fail(TARGET, "no memory");
    *child = (struct child){.pid = pid, .in = in[1], .out = out[0], .words = said};
    return child;
}

void child_signal(struct child *child, int number) {
    if (child->pid)
        kill(-child->pid, number);
}

void child_say(struct child *child, const char *bytes, size_t size) {
    while (size) {
        ssize_t put = write(child->in, bytes, size);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return; // it has ended: reading says how
        bytes += put;
        size -= (size_t)put;
    }
}

static void read_more(struct child *child) {
    if (child->room - child->length < PIECE) {
        char *larger = realloc(child->pending, child->room = child->length + 4 * PIECE);
        if (!larger || child->length > MAX_SAID)
            fail(TARGET, "a process says more than %d MB", MAX_SAID >> 20);
        child->pending = larger;
    }
    ssize_t got = read(child->out, child->pending + child->length, PIECE);
    if (got > 0)
        child->length += (size_t)got;
    else if (got == 0 || errno != EINTR)
        child->over = true;
}

char *child_line(struct child *child, int64_t late_ns) {
    for (;;) {
        char *end = child->length ? memchr(child->pending, '\n', child->length) : NULL;
        if (end) {
            size_t size = (size_t)(end - child->pending);
            char *line = take_text(child->pending, size);
            child->length -= size + 1;
            memmove(child->pending, end + 1, child->length);
            return line;
        }
        if (child->over)
            return take_text("", 0);
        if (clock_ns() > late_ns)
            return NULL;
        if (wire_wait(child->out, 200))
            read_more(child);
    }
}

char *child_rest(struct child *child, int64_t late_ns) {
    close(child->in);
    child->in = -1;
    while (!child->over) {
        if (clock_ns() > late_ns)
            return NULL;
        if (wire_wait(child->out, 200))
            read_more(child);
    }
    return take_text(child->pending ? child->pending : "", child->length);
}

bool child_code(struct child *child, int *code) {
    for (int waited = 0; child->pid && waited <= CODE_WAIT_MS; waited += 10) {
        if (waitpid(child->pid, &child->status, WNOHANG) == child->pid)
            child->pid = 0;
        else
            usleep(10000);
    }
    *code = WIFSIGNALED(child->status) ? -WTERMSIG(child->status) : WEXITSTATUS(child->status);
    return !child->pid;
}

char *child_last_words(struct child *child) {
    off_t size = lseek(child->words, 0, SEEK_END);
    char *text = take(WORDS + 1);
    ssize_t got = pread(child->words, text, WORDS, size > WORDS ? size - WORDS : 0);
    size_t length = got < 0 ? 0 : (size_t)got;
    while (length && strchr(" \t\r\n", text[length - 1]))
        length--;
    text[length] = 0;
    char *last = strrchr(text, '\n'), *shown = take(301);
    one_line(shown, 301, last ? last + 1 : text);
    return shown;
}

void child_end(struct child *child) {
    if (child->pid) {
        kill(-child->pid, SIGKILL);
        waitpid(child->pid, NULL, 0);
    }
    if (child->in >= 0)
        close(child->in);
    close(child->out);
    close(child->words);
    free(child->pending);
    free(child);
}
