# How a library is linked that runs on other machines than the one that builds it (Linux; elsewhere nothing is changed).
#
# - Only the named symbols can be seen from outside, the library is hardened, and dead code is left out.
# - libstdc++ is linked in where its static library is there: distributions with an old one can then load the library too.
# - glibc: what is called got new versions of old symbols in 2.29 (exp, log, pow) and 2.34 (what the addon and the CUDA runtime take
#   from libpthread, libdl and librt moved into libc). The libraries made here have nothing but these names, in the version every glibc has, and stand before the real
#   ones when linking. At run time the real ones give what is asked for, as they do for any old program.
include(CheckCXXSourceCompiles)
set(AG_LINUX OFF)
if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
  set(AG_LINUX ON)
  set(CMAKE_REQUIRED_LINK_OPTIONS -static-libstdc++)
  check_cxx_source_compiles("#include <sstream>\nint main() { std::ostringstream s; s << 1; }" ALIGNGPT_STATIC_LIBSTDCXX)
  unset(CMAKE_REQUIRED_LINK_OPTIONS)
  check_cxx_source_compiles("#include <features.h>\n#ifndef __GLIBC__\n#error\n#endif\nint main() {}" ALIGNGPT_GLIBC)
endif()

# A library of `soname` with symbols in versions (pairs: version, list), of which nothing but the names is used.
function(add_old_glibc name soname)
  set(code "")
  set(map "")
  set(versions ${ARGN})
  while(versions)
    list(POP_FRONT versions version symbols)
    string(REPLACE "," ";" symbols "${symbols}")
    foreach(symbol ${symbols})
      string(APPEND code "void ${symbol}(void);\nvoid ${symbol}(void) {}\n")
    endforeach()
    list(JOIN symbols ";\n" symbols)
    string(APPEND map "${version} {\n${symbols};\n};\n")
  endwhile()
  set(base "${CMAKE_BINARY_DIR}/glibc/${name}")
  file(CONFIGURE OUTPUT "${base}.cc" CONTENT "extern \"C\" {\n${code}}\n")
  file(CONFIGURE OUTPUT "${base}.map" CONTENT "${map}")
  add_library(${name} SHARED "${base}.cc")
  set_target_properties(${name} PROPERTIES CXX_VISIBILITY_PRESET default NO_SONAME ON COMPILE_OPTIONS -fno-builtin
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/glibc")  # not beside the addon: it is not shipped
  target_link_options(${name} PRIVATE -nostdlib "-Wl,-soname,${soname}" "-Wl,--version-script=${base}.map")
  set_property(GLOBAL APPEND PROPERTY AG_OLD_GLIBC ${name})
endfunction()

# The version of what glibc has had from its beginning on a CPU, and what came a little later there.
set(AG_FIRST "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
  set(AG_FIRST GLIBC_2.2.5)
  set(AG_SOON ";GLIBC_2.3.4;")
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(AG_FIRST GLIBC_2.17)
  set(AG_SOON ",")  # the same
endif()
if(ALIGNGPT_GLIBC AND ALIGNGPT_STATIC_LIBSTDCXX AND NOT ALIGNGPT_SANITIZE AND AG_FIRST)
  # a version is what `objdump -T` of the library shows in brackets beside the new one
  add_old_glibc(old_m libm.so.6 ${AG_FIRST} exp,log,pow)
  add_old_glibc(old_dl libdl.so.2 ${AG_FIRST} dladdr,dlclose,dlerror,dlopen,dlsym,dlvsym${AG_SOON}dlmopen)
  add_old_glibc(old_rt librt.so.1 ${AG_FIRST} shm_open,shm_unlink)
  set(rwlock destroy init rdlock timedrdlock timedwrlock tryrdlock trywrlock unlock wrlock)
  list(TRANSFORM rwlock PREPEND pthread_rwlock_)
  list(JOIN rwlock "," rwlock)
  string(CONCAT threads
    pthread_create,pthread_detach,pthread_getspecific,pthread_join,pthread_key_create,pthread_key_delete,pthread_kill,pthread_once,
    pthread_setspecific,pthread_condattr_setpshared,pthread_mutex_trylock,pthread_mutexattr_destroy,pthread_mutexattr_init,
    pthread_mutexattr_setpshared,pthread_mutexattr_settype,pthread_rwlockattr_destroy,pthread_rwlockattr_init,
    pthread_rwlockattr_setpshared,pthread_spin_destroy,pthread_spin_init,pthread_spin_lock,pthread_spin_trylock,pthread_spin_unlock,
    sem_destroy,sem_init,sem_post,sem_timedwait,sem_trywait,sem_wait)
  add_old_glibc(old_pthread libpthread.so.0
    ${AG_FIRST} ${threads},${rwlock}${AG_SOON}pthread_getaffinity_np,pthread_setaffinity_np)
endif()

# ship(target symbol...): `symbol`s are what the target shows.
function(ship target)
  if(NOT AG_LINUX)
    return()
  endif()
  list(JOIN ARGN ";\n" symbols)
  file(CONFIGURE OUTPUT "${CMAKE_BINARY_DIR}/${target}.map" CONTENT "{ global:\n${symbols};\nlocal: *; };\n")
  target_link_options(${target} PRIVATE "-Wl,--version-script=${CMAKE_BINARY_DIR}/${target}.map"
    -Wl,-z,relro,-z,now,-z,noexecstack -Wl,--gc-sections)
  get_property(old GLOBAL PROPERTY AG_OLD_GLIBC)
  if(ALIGNGPT_STATIC_LIBSTDCXX)
    target_link_options(${target} PRIVATE -static-libstdc++)
  endif()
  if(old)
    target_sources(${target} PRIVATE ${CMAKE_SOURCE_DIR}/cmake/glibc.cc)
    target_link_libraries(${target} PRIVATE ${old})
  endif()
endfunction()
