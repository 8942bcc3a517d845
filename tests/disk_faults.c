/* Counts the calls that change a disk under $DISK_FAULTS_ROOT, and lets one of them fail or the process die at it.
 *
 * cc -shared -fPIC -o disk_faults.so disk_faults.c -ldl; loaded with LD_PRELOAD, and armed by disk_faults_arm(). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static long left = -1, counted;
static int fault;

/* The n-th call from now fails with `number`, or kills the process when that is 0; none does when n is 0. */
void disk_faults_arm(long n, int number) { left = n; fault = number; counted = 0; }
long disk_faults_count(void) { long all = counted; left = -1; return all; }

static int struck(void) {
  if (left < 0) return 0;
  counted++;
  if (counted != left) return 0;
  if (!fault) { kill(getpid(), SIGKILL); pause(); }
  errno = fault;
  return 1;
}

static int is_ours(const char *path) {
  const char *root = getenv("DISK_FAULTS_ROOT");
  return left >= 0 && root && path && (path[0] != '/' || strncmp(path, root, strlen(root)) == 0);
}

static int is_file(int fd) {
  struct stat found;
  int before = errno, regular = left >= 0 && fstat(fd, &found) == 0 && S_ISREG(found.st_mode);
  errno = before;
  return regular;
}

#define REAL(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                              \
  int name(const char *path, int flags, ...) {                                  \
    va_list more;                                                               \
    va_start(more, flags);                                                      \
    int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0;           \
    va_end(more);                                                               \
    if (flags & (O_CREAT | O_WRONLY | O_RDWR) && is_ours(path) && struck()) return -1; \
    return REAL(int, name, const char *, int, ...)(path, flags, mode);          \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                            \
  int name(int folder, const char *path, int flags, ...) {                      \
    va_list more;                                                               \
    va_start(more, flags);                                                      \
    int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0;           \
    va_end(more);                                                               \
    if (flags & (O_CREAT | O_WRONLY | O_RDWR) && is_ours(path) && struck()) return -1; \
    return REAL(int, name, int, const char *, int, ...)(folder, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

#define BY_FD(type, name, types, names)                                         \
  type name types {                                                             \
    if (is_file(fd) && struck()) return -1;                                     \
    return ((type(*) types)dlsym(RTLD_NEXT, #name)) names;                      \
  }
BY_FD(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
BY_FD(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
BY_FD(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
BY_FD(ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
BY_FD(ssize_t, sendfile, (int fd, int from, off_t *at, size_t size), (fd, from, at, size))
BY_FD(ssize_t, sendfile64, (int fd, int from, off64_t *at, size_t size), (fd, from, at, size))
BY_FD(int, fsync, (int fd), (fd))
BY_FD(int, fdatasync, (int fd), (fd))
BY_FD(int, ftruncate, (int fd, off_t size), (fd, size))
BY_FD(int, ftruncate64, (int fd, off64_t size), (fd, size))
BY_FD(int, fchmod, (int fd, mode_t mode), (fd, mode))

#define BY_PATH(name, types, names)                                             \
  int name types {                                                              \
    if (is_ours(path) && struck()) return -1;                                   \
    return ((int (*) types)dlsym(RTLD_NEXT, #name)) names;                      \
  }
BY_PATH(rename, (const char *path, const char *to), (path, to))
BY_PATH(renameat, (int one, const char *path, int other, const char *to), (one, path, other, to))
BY_PATH(renameat2, (int one, const char *path, int other, const char *to, unsigned flags), (one, path, other, to, flags))
BY_PATH(unlink, (const char *path), (path))
BY_PATH(unlinkat, (int folder, const char *path, int flags), (folder, path, flags))
BY_PATH(rmdir, (const char *path), (path))
BY_PATH(mkdir, (const char *path, mode_t mode), (path, mode))
BY_PATH(mkdirat, (int folder, const char *path, mode_t mode), (folder, path, mode))
BY_PATH(chmod, (const char *path, mode_t mode), (path, mode))
BY_PATH(fchmodat, (int folder, const char *path, mode_t mode, int flags), (folder, path, mode, flags))

int symlink(const char *to, const char *path) {
  if (is_ours(path) && struck()) return -1;
  return REAL(int, symlink, const char *, const char *)(to, path);
}
