// Two things of newer glibc that have no older version, so that the library loads where they are missing
// (cmake/ship.cmake).
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

extern "C" {
// 2.32: libstdc++ asks whether it may count references without atomics. The pool has threads, so it may not.
extern char __libc_single_threaded;
char __libc_single_threaded = 0;

// 2.33: the CUDA runtime calls it. The kernel's struct is glibc's.
int stat(const char* path, struct stat* to) { return int(syscall(SYS_newfstatat, AT_FDCWD, path, to, 0)); }
}
