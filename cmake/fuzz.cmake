# Fuzz targets: tests/fuzz holds the targets as functions. fuzz_tests replays the corpus on them in any build; with
# -DANYKVM_FUZZ=ON (the fuzz preset, clang) each also becomes a libFuzzer program.

file(GLOB FUZZ_SOURCES CONFIGURE_DEPENDS tests/fuzz/*.cpp)
list(FILTER FUZZ_SOURCES EXCLUDE REGEX "(libfuzzer|_test)\\.cpp$")
add_library(fuzz_targets STATIC EXCLUDE_FROM_ALL ${FUZZ_SOURCES})
target_link_libraries(fuzz_targets PUBLIC anykvm_vmm anykvm_machine)
target_include_directories(fuzz_targets PUBLIC tests)

foreach(target ioctl_sequence guest loader)
  string(REPLACE _sequence "" name ${target})
  add_executable(fuzz_${name} tests/fuzz/libfuzzer.cpp)
  target_compile_definitions(fuzz_${name} PRIVATE ANYKVM_FUZZ_TARGET=${target})
  target_link_libraries(fuzz_${name} PRIVATE fuzz_targets)
  target_link_options(fuzz_${name} PRIVATE -fsanitize=fuzzer)
endforeach()
