/* Preloaded before libc: fails, or kills, at the n-th call that changes a file below a folder.
 *
 * Counted are open for writing, write, pwrite, writev, fsync, fdatasync, ftruncate, rename, link, mkdir, chmod, unlink
 * and rmdir, whoever makes them: Python, Rust or C++. Nothing happens until shim_arm() is called. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static volatile long calls, fatal; /* so far; the first that is hit, 0 for none */
static volatile int code, lasting; /* errno, 0 to die; whether all later calls fail, too */

long shim_calls(void) { return calls; }

/* What was done, a line each: the name of the call and the path. */
static char done_log[1 << 20];
static volatile size_t done_length;

const char *shim_log(void) { return done_log; }

static void note(const char *name, const char *path) {
    size_t length = strlen(name) + strlen(path) + 3;
    size_t at = __sync_fetch_and_add(&done_length, length - 1);
    if (at + length < sizeof done_log) snprintf(done_log + at, length, "%s %s\n", name, path);
}

void shim_arm(const char *path, long first, int error, int forever) {
    calls = 0, fatal = first, code = error, lasting = forever, done_length = 0, done_log[0] = 0;
    snprintf(folder, sizeof folder, "%s", path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int below(const char *path) {
    char whole[2 * PATH_MAX];
    if (!folder[0] || !path) return 0;
    if (path[0] == '/') return strncmp(path, folder, strlen(folder)) == 0;
    if (!getcwd(whole, PATH_MAX)) return 0;
    return strncmp(whole, folder, strlen(folder)) == 0;
}

/* Whether it is open on something there; its path is noted with the call. */
static int open_below(int fd, const char *name) {
    char link[64], path[PATH_MAX];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (path[0] != '/' || !below(path)) return 0; /* a pipe has no place */
    note(name, path);
    return 1;
}

/* Whether this call shall fail; errno is set then. Removing a file works on a full disk. */
static int hit(int removes) {
    long now = __sync_add_and_fetch(&calls, 1);
    if (!fatal || now < fatal || (now > fatal && !lasting)) return 0;
    if (!code) kill(getpid(), SIGKILL);
    if (removes && code != EROFS) return 0;
    errno = code;
    return 1;
}

/* Bytes to write before the fault: a disk fills up, and a process dies, in the middle of a write. */
static size_t torn(size_t size) {
    int next = fatal && calls + 1 == fatal && (!code || code == ENOSPC);
    return next ? size / 2 : 0;
}

#define WRITE(name, parameters, real)                                                                                  \
    ssize_t name parameters {                                                                                          \
        if (!open_below(fd, #name)) return (real);                                                                            \
        size_t whole = size, half = torn(size);                                                                        \
        if (half) {                                                                                                    \
            size = half;                                                                                               \
            ssize_t done = (real);                                                                                     \
            if (!code) kill(getpid(), SIGKILL);                                                                        \
            return done; /* a short write; the next one, still the n-th, fails */                                      \
        }                                                                                                              \
        size = whole;                                                                                                  \
        return hit(0) ? -1 : (real);                                                                                   \
    }

WRITE(write, (int fd, const void *data, size_t size), REAL(write)(fd, data, size))
WRITE(pwrite, (int fd, const void *data, size_t size, off_t at), REAL(pwrite)(fd, data, size, at))
WRITE(pwrite64, (int fd, const void *data, size_t size, off64_t at), REAL(pwrite64)(fd, data, size, at))

ssize_t writev(int fd, const struct iovec *parts, int count) {
    return open_below(fd, "writev") && hit(0) ? -1 : REAL(writev)(fd, parts, count);
}

#define ON_FD(name, parameters, ...)                                                                                   \
    int name parameters { return open_below(fd, #name) && hit(0) ? -1 : REAL(name)(__VA_ARGS__); }

ON_FD(fsync, (int fd), fd)
ON_FD(fdatasync, (int fd), fd)
ON_FD(ftruncate, (int fd, off_t size), fd, size)
ON_FD(ftruncate64, (int fd, off64_t size), fd, size)
ON_FD(fchmod, (int fd, mode_t mode), fd, mode)

#define ON_PATH(name, removes, to, parameters, ...)                                                                    \
    int name parameters {                                                                                              \
        if (!below(path)) return REAL(name)(__VA_ARGS__);                                                              \
        note(#name, to);                                                                                               \
        return hit(removes) ? -1 : REAL(name)(__VA_ARGS__);                                                            \
    }

ON_PATH(rename, 0, to, (const char *path, const char *to), path, to)
ON_PATH(link, 0, to, (const char *path, const char *to), path, to)
ON_PATH(renameat, 0, to, (int a, const char *path, int b, const char *to), a, path, b, to)
ON_PATH(renameat2, 0, to, (int a, const char *path, int b, const char *to, unsigned int flags), a, path, b, to, flags)
ON_PATH(linkat, 0, to, (int a, const char *path, int b, const char *to, int flags), a, path, b, to, flags)
ON_PATH(mkdir, 0, path, (const char *path, mode_t mode), path, mode)
ON_PATH(chmod, 0, path, (const char *path, mode_t mode), path, mode)
ON_PATH(unlink, 1, path, (const char *path), path)
ON_PATH(rmdir, 1, path, (const char *path), path)

#define OPEN(name, parameters, ...)                                                                                    \
    int name parameters {                                                                                              \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                        \
        va_end(rest);                                                                                                  \
        if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && below(path) && hit(0)) return -1;                               \
        return REAL(name)(__VA_ARGS__, flags, mode);                                                                   \
    }

OPEN(open, (const char *path, int flags, ...), path)
OPEN(open64, (const char *path, int flags, ...), path)
OPEN(openat, (int folder_fd, const char *path, int flags, ...), folder_fd, path)
OPEN(openat64, (int folder_fd, const char *path, int flags, ...), folder_fd, path)
