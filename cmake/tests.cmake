# One test program per room of tests/, which mirrors src/: tests/irqchip/*.cpp becomes irqchip_tests, one ctest entry per case.
# tests/system holds scripts that drive the built command; its own CMakeLists.txt registers them;
# so do tests/preload's, whose program is a client of the interposer.

find_package(GTest REQUIRED)
include(GoogleTest)

set(UNIT_ENVIRONMENT)
set(TEST_ENVIRONMENT)  # of the system tests
if(ANYKVM_SANITIZE MATCHES thread)
  set(UNIT_ENVIRONMENT TSAN_OPTIONS=suppressions=${CMAKE_SOURCE_DIR}/tests/tsan.supp)
  # Zydis clears its structures on the stack by memset() for each instruction, which the sanitizer would follow. It does
  # not bear that option where a thread is cancelled, as in a unit test.
  set(TEST_ENVIRONMENT ${UNIT_ENVIRONMENT}:ignore_noninstrumented_modules=1)
endif()

# A ctest entry for each case of the room's program, on the engine ("default": whatever is). gtest_discover_tests() cannot pass
# lists as properties: they are set by a file that ctest reads behind the one with the tests.
function(add_cases room engine)
  set(suffix "")
  set(environment ${UNIT_ENVIRONMENT})
  if(NOT engine STREQUAL "default")
    set(suffix ".${engine}")
    list(APPEND environment "ANYKVM_ENGINE=${engine}")
  endif()
  set(cases ${room}_cases${suffix})
  gtest_discover_tests(${room}_tests DISCOVERY_MODE PRE_TEST TEST_SUFFIX "${suffix}" TEST_LIST ${cases})
  set(file ${CMAKE_CURRENT_BINARY_DIR}/${cases}.cmake)
  file(WRITE ${file} "set_tests_properties(\${${cases}} PROPERTIES TIMEOUT 120 LABELS \"unit;${room}\" ENVIRONMENT \"${environment}\")\n")
  set_property(DIRECTORY APPEND PROPERTY TEST_INCLUDE_FILES ${file})
endfunction()

file(GLOB TEST_ROOMS RELATIVE ${CMAKE_SOURCE_DIR}/tests CONFIGURE_DEPENDS tests/*)
list(REMOVE_ITEM TEST_ROOMS system clients preload)
foreach(room ${TEST_ROOMS})
  file(GLOB_RECURSE TEST_SOURCES CONFIGURE_DEPENDS tests/${room}/*.cpp tests/${room}/*.c tests/${room}/*.S)
  if(TEST_SOURCES MATCHES "_test\\.cpp")
    add_executable(${room}_tests ${TEST_SOURCES})
    if(TARGET anykvm_vmm AND room MATCHES "^(vmm|tools|fuzz)$")
      target_link_libraries(${room}_tests anykvm_vmm)
    endif()
    target_link_libraries(${room}_tests anykvm_machine GTest::gmock GTest::gtest_main)
    target_include_directories(${room}_tests PRIVATE tests)
    target_compile_definitions(${room}_tests PRIVATE ANYKVM_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
    # Where guests run, on both engines.
    set(engines "default")
    if(room MATCHES "^(oracle|isa)$")
      set(engines interpret translate-exact)
    elseif(room MATCHES "^(vcpu|client)$")
      set(engines interpret translate)
    endif()
    foreach(engine ${engines})
      add_cases(${room} ${engine})
    endforeach()
  endif()
endforeach()

add_subdirectory(tests/preload)
add_subdirectory(tests/clients)
if(EXISTS ${CMAKE_SOURCE_DIR}/tests/system/CMakeLists.txt)
  add_subdirectory(tests/system)
endif()
