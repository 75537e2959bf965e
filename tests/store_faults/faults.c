/* Counts a process's I/O calls below one directory, and does harm at the one that it is told.
 *
 * Preloaded, it stands before libc's functions: those of Python, and those of SQLite. Until it is armed it only hands
 * on. Writes to memory-mapped files are no calls; SQLite maps its WAL index alone, which is rebuilt after a crash.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum action { COUNT, KILL, KILL_TORN, FAIL_ONCE, FAIL_FROM };

static char root[PATH_MAX];
static size_t root_length;
static enum action action;
static long at;         /* the call, from 1, that is harmed */
static int with_reads;  /* whether calls that change nothing count */
static int error_number;
static int is_armed;
static atomic_long num_calls;

#define MAX_TRACE 100000
static char trace[MAX_TRACE]; /* one letter per counted call */

void faults_arm(const char *directory, int what, long call, int reads, int error)
{
    root_length = (size_t)snprintf(root, sizeof root, "%s", directory);
    action = (enum action)what;
    at = call;
    with_reads = reads;
    error_number = error;
    atomic_store(&num_calls, 0);
    is_armed = 1;
}

long faults_disarm(void)
{
    is_armed = 0;
    return atomic_load(&num_calls);
}

const char *faults_trace(void) { return trace; }

static int is_below_root(const char *path)
{
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == '\0');
}

static int fd_path(int fd, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0)
        return 0;
    path[length] = '\0';
    return 1;
}

static int counts_fd(int fd)
{
    char path[PATH_MAX];
    return is_armed && fd_path(fd, path) && is_below_root(path);
}

static int counts_path(int directory, const char *path)
{
    char full[2 * PATH_MAX];
    if (!is_armed)
        return 0;
    if (path[0] == '/')
        return is_below_root(path);
    if (directory == AT_FDCWD ? getcwd(full, PATH_MAX) == NULL : !fd_path(directory, full))
        return 0;
    strcat(full, "/");
    strncat(full, path, PATH_MAX - 1);
    return is_below_root(full);
}

static void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

/* Count a call. Returns whether it is to fail; if it is a write to be torn, *is_torn says so. */
static int harm(char letter, int *is_torn)
{
    int saved = errno;
    long call = atomic_fetch_add(&num_calls, 1) + 1;
    if (call < MAX_TRACE) {
        trace[call - 1] = letter;
        trace[call] = '\0';
    }
    int is_hit = call == at || (action == FAIL_FROM && call > at);
    errno = saved;
    if (!is_hit || action == COUNT)
        return 0;
    if (action == KILL_TORN && is_torn != NULL) {
        *is_torn = 1;
        return 0;
    }
    if (action == KILL || action == KILL_TORN)
        die();
    errno = error_number;
    return 1;
}

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

#define FAILS_AT(directory, path, letter) (counts_path(directory, path) && harm(letter, NULL))

static int fails_open(int directory, const char *path, int flags)
{
    int writes = (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
    return (writes || with_reads) && FAILS_AT(directory, path, writes ? 'o' : 'O');
}

#define MODE(flags, mode)                                                                                              \
    mode_t mode = 0;                                                                                                   \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                                                                             \
        va_list arguments;                                                                                             \
        va_start(arguments, flags);                                                                                    \
        mode = va_arg(arguments, mode_t);                                                                              \
        va_end(arguments);                                                                                             \
    }

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...)                                                                         \
    {                                                                                                                  \
        MODE(flags, mode)                                                                                              \
        return fails_open(AT_FDCWD, path, flags) ? -1 : REAL(name)(path, flags, mode);                                 \
    }

#define OPENAT(name)                                                                                                   \
    int name(int directory, const char *path, int flags, ...)                                                          \
    {                                                                                                                  \
        MODE(flags, mode)                                                                                              \
        return fails_open(directory, path, flags) ? -1 : REAL(name)(directory, path, flags, mode);                     \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

/* A write that is torn ends, and with it the process, after half of its bytes. */
#define WRITE(name, extra, pass)                                                                                       \
    ssize_t name(int fd, const void *data, size_t size extra)                                                          \
    {                                                                                                                  \
        int is_torn = 0;                                                                                               \
        if (counts_fd(fd) && harm('w', &is_torn))                                                                      \
            return -1;                                                                                                 \
        ssize_t written = REAL(name)(fd, data, is_torn ? size / 2 : size pass);                                        \
        if (is_torn)                                                                                                   \
            die();                                                                                                     \
        return written;                                                                                                \
    }

#define COMMA ,
WRITE(write, , )
WRITE(pwrite, COMMA off_t offset, COMMA offset)
WRITE(pwrite64, COMMA off64_t offset, COMMA offset)

#define ON_FD(name, letter, type, parameters, arguments)                                                               \
    type name parameters                                                                                               \
    {                                                                                                                  \
        return counts_fd(fd) && harm(letter, NULL) ? -1 : REAL(name) arguments;                                        \
    }

ON_FD(writev, 'w', ssize_t, (int fd, const struct iovec *parts, int count), (fd, parts, count))
ON_FD(pwritev64v2, 'w', ssize_t, (int fd, const struct iovec *parts, int count, off64_t offset, int flags),
      (fd, parts, count, offset, flags))
ON_FD(fsync, 's', int, (int fd), (fd))
ON_FD(fdatasync, 's', int, (int fd), (fd))
ON_FD(ftruncate, 't', int, (int fd, off_t size), (fd, size))
ON_FD(ftruncate64, 't', int, (int fd, off64_t size), (fd, size))
ON_FD(fallocate, 'a', int, (int fd, int mode, off_t offset, off_t size), (fd, mode, offset, size))
ON_FD(fallocate64, 'a', int, (int fd, int mode, off64_t offset, off64_t size), (fd, mode, offset, size))

/* These return the error's number. */
#define ALLOCATE(name, type)                                                                                           \
    int name(int fd, type offset, type size)                                                                           \
    {                                                                                                                  \
        return counts_fd(fd) && harm('a', NULL) ? error_number : REAL(name)(fd, offset, size);                         \
    }

ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)

#define READ(name, parameters, arguments)                                                                              \
    ssize_t name parameters                                                                                            \
    {                                                                                                                  \
        return with_reads && counts_fd(fd) && harm('R', NULL) ? -1 : REAL(name) arguments;                             \
    }

READ(read, (int fd, void *data, size_t size), (fd, data, size))
READ(pread, (int fd, void *data, size_t size, off_t offset), (fd, data, size, offset))
READ(pread64, (int fd, void *data, size_t size, off64_t offset), (fd, data, size, offset))
READ(preadv, (int fd, const struct iovec *parts, int count, off_t offset), (fd, parts, count, offset))
READ(preadv2, (int fd, const struct iovec *parts, int count, off_t offset, int flags), (fd, parts, count, offset, flags))
READ(preadv64v2, (int fd, const struct iovec *parts, int count, off64_t offset, int flags),
     (fd, parts, count, offset, flags))
READ(preadv64, (int fd, const struct iovec *parts, int count, off64_t offset), (fd, parts, count, offset))

#define ON_PATH(name, letter, directory, counted, parameters, arguments)                                               \
    int name parameters { return FAILS_AT(directory, counted, letter) ? -1 : REAL(name) arguments; }

ON_PATH(mkdir, 'm', AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
ON_PATH(mkdirat, 'm', fd, path, (int fd, const char *path, mode_t mode), (fd, path, mode))
ON_PATH(unlink, 'u', AT_FDCWD, path, (const char *path), (path))
ON_PATH(unlinkat, 'u', fd, path, (int fd, const char *path, int flags), (fd, path, flags))
ON_PATH(rmdir, 'u', AT_FDCWD, path, (const char *path), (path))
ON_PATH(truncate, 't', AT_FDCWD, path, (const char *path, off_t size), (path, size))
ON_PATH(truncate64, 't', AT_FDCWD, path, (const char *path, off64_t size), (path, size))
ON_PATH(rename, 'r', AT_FDCWD, to, (const char *from, const char *to), (from, to))
ON_PATH(renameat, 'r', to_fd, to, (int from_fd, const char *from, int to_fd, const char *to), (from_fd, from, to_fd, to))
ON_PATH(link, 'l', AT_FDCWD, to, (const char *from, const char *to), (from, to))
ON_PATH(linkat, 'l', to_fd, to, (int from_fd, const char *from, int to_fd, const char *to, int flags),
        (from_fd, from, to_fd, to, flags))
ON_PATH(symlink, 'l', AT_FDCWD, path, (const char *target, const char *path), (target, path))
ON_PATH(symlinkat, 'l', fd, path, (const char *target, int fd, const char *path), (target, fd, path))
