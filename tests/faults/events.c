/* Loaded before libc, counts what a process does to the files of one folder, and at the event of a
   given number lets something happen. Python calls `arm` in the process that shall break:

     count  nothing happens
     kill   SIGKILL, before the event; half of a write is done
     power  the same, and what was not synced is lost: files are cut to what fsync had seen of them
     full   from there on the disk is full: ENOSPC for what needs room; half of a write is done

   Every event is a line in the log: number, call, path. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { FILES = 512, LENGTH = 1024 };
enum { COUNT, KILL, POWER, FULL };

static char folder[LENGTH];
static size_t folder_length;
static int mode = COUNT, log_file = -1;
static long at = -1, events;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Files with bytes that are not on the disk for certain. */
static struct { char path[LENGTH]; off_t synced; } unsynced[FILES];
static int files;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

void arm(const char *where, const char *how, long number, const char *log) {
    snprintf(folder, sizeof folder, "%s", where);
    folder_length = strlen(folder);
    mode = !strcmp(how, "kill") ? KILL : !strcmp(how, "power") ? POWER : !strcmp(how, "full") ? FULL : COUNT;
    at = number;
    log_file = REAL(open)(log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
}

static int watched(const char *path) {
    return folder_length && path && !strncmp(path, folder, folder_length) &&
           (path[folder_length] == '/' || !path[folder_length]);
}

static int path_of(int fd, char *path) {
    char link[64];
    if (!folder_length || fd == log_file) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t length = readlink(link, path, LENGTH - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return watched(path);
}

static int place(const char *path) {
    for (int i = 0; i < files; i++)
        if (!strcmp(unsynced[i].path, path)) return i;
    return -1;
}

static void forget(const char *path) {
    const int i = place(path);
    if (i >= 0) unsynced[i] = unsynced[--files];
}

/* Before bytes are added or cut: what is there now counts as synced, unless it was noted before. */
static void dirty(const char *path, off_t synced) {
    struct stat status;
    pthread_mutex_lock(&lock);
    if (place(path) < 0 && files < FILES) {
        if (synced < 0) synced = stat(path, &status) ? 0 : status.st_size;
        snprintf(unsynced[files].path, LENGTH, "%s", path);
        unsynced[files++].synced = synced;
    }
    pthread_mutex_unlock(&lock);
}

static void die(void) {
    if (mode == POWER)
        for (int i = 0; i < files; i++)
            if (REAL(truncate)(unsynced[i].path, unsynced[i].synced)) continue;
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Whether this is the event at which things happen; of "full", or a later one. */
static int happens(const char *call, const char *path) {
    char line[LENGTH + 64];
    pthread_mutex_lock(&lock);
    const long number = events++;
    const int length = snprintf(line, sizeof line, "%ld %s %s\n", number, call, path + folder_length);
    if (REAL(write)(log_file, line, length) != length) abort();
    const int now = mode != COUNT && (mode == FULL ? number >= at : number == at);
    pthread_mutex_unlock(&lock);
    return at >= 0 && now;
}

/* For events that are done or not: kills here, or says that there is no room. */
static int refused(const char *call, const char *path, int needs_room) {
    if (!watched(path) || !happens(call, path)) return 0;
    if (mode != FULL) die();
    errno = ENOSPC;
    return needs_room;
}

static int opening(const char *path, int flags) {
    struct stat status;
    if (!watched(path) || (flags & O_ACCMODE) == O_RDONLY) return 0;
    const int made = flags & O_CREAT && stat(path, &status);
    if (refused("open", path, made)) return 1;
    if (flags & O_TRUNC || made) {
        forget(path);
        dirty(path, 0);
    }
    return 0;
}

#define OPEN(name, parameters, ...)                                                               \
    int name parameters {                                                                         \
        mode_t permissions = 0;                                                                   \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                      \
            va_list rest;                                                                         \
            va_start(rest, flags);                                                                \
            permissions = va_arg(rest, mode_t);                                                   \
            va_end(rest);                                                                         \
        }                                                                                         \
        return opening(path, flags) ? -1 : REAL(name)(__VA_ARGS__, permissions);                  \
    }
OPEN(open, (const char *path, int flags, ...), path, flags)
OPEN(open64, (const char *path, int flags, ...), path, flags)
OPEN(openat, (int at_, const char *path, int flags, ...), at_, path, flags)
OPEN(openat64, (int at_, const char *path, int flags, ...), at_, path, flags)

ssize_t write(int fd, const void *bytes, size_t count) {
    char path[LENGTH];
    if (path_of(fd, path)) {
        dirty(path, -1);
        if (happens("write", path)) {
            const ssize_t done = REAL(write)(fd, bytes, mode == FULL && events - 1 > at ? 0 : count / 2);
            if (mode != FULL) die();
            if (done > 0) return done; /* the rest is asked for again */
            errno = ENOSPC;
            return -1;
        }
    }
    return REAL(write)(fd, bytes, count);
}

static int syncing(int fd, const char *call) {
    char path[LENGTH];
    if (!path_of(fd, path)) return 0;
    if (refused(call, path, 0)) return 1;
    pthread_mutex_lock(&lock);
    forget(path);
    pthread_mutex_unlock(&lock);
    return 0;
}

int fsync(int fd) { return syncing(fd, "fsync") ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return syncing(fd, "fdatasync") ? -1 : REAL(fdatasync)(fd); }

int ftruncate(int fd, off_t length) {
    char path[LENGTH];
    if (path_of(fd, path) && refused("ftruncate", path, 0)) return -1;
    return REAL(ftruncate)(fd, length);
}

int rename(const char *from, const char *to) {
    if (refused("rename", to, 0)) return -1;
    if (watched(to)) {
        pthread_mutex_lock(&lock);
        forget(to);
        const int i = place(from);
        if (i >= 0) snprintf(unsynced[i].path, LENGTH, "%s", to);
        pthread_mutex_unlock(&lock);
    }
    return REAL(rename)(from, to);
}

int unlink(const char *path) {
    if (refused("unlink", path, 0)) return -1;
    pthread_mutex_lock(&lock);
    forget(path);
    pthread_mutex_unlock(&lock);
    return REAL(unlink)(path);
}

int rmdir(const char *path) { return refused("rmdir", path, 0) ? -1 : REAL(rmdir)(path); }

int mkdir(const char *path, mode_t permissions) {
    return refused("mkdir", path, 1) ? -1 : REAL(mkdir)(path, permissions);
}
