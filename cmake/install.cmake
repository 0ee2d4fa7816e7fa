# What `cmake --install` puts where: library, headers, command, find_package(anykvm), pkg-config.

include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

install(TARGETS anykvm EXPORT anykvm-targets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/anykvm DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")
if(TARGET anykvm_preload)
  install(TARGETS anykvm_preload LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
endif()
if(TARGET anykvm_tool)
  install(TARGETS anykvm_tool RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()

set(ANYKVM_PACKAGE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/anykvm)
install(EXPORT anykvm-targets NAMESPACE anykvm:: DESTINATION ${ANYKVM_PACKAGE_DIR})
configure_package_config_file(cmake/anykvm-config.cmake.in ${CMAKE_BINARY_DIR}/anykvm-config.cmake
                              INSTALL_DESTINATION ${ANYKVM_PACKAGE_DIR})
write_basic_package_version_file(${CMAKE_BINARY_DIR}/anykvm-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/anykvm-config.cmake ${CMAKE_BINARY_DIR}/anykvm-config-version.cmake
        DESTINATION ${ANYKVM_PACKAGE_DIR})

# Relative to the file itself, so that an installed tree can be moved.
file(RELATIVE_PATH ANYKVM_PC_PREFIX /prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig /prefix)
string(PREPEND ANYKVM_PC_PREFIX "\${pcfiledir}/")
string(REGEX REPLACE "/$" "" ANYKVM_PC_PREFIX ${ANYKVM_PC_PREFIX})
configure_file(cmake/anykvm.pc.in ${CMAKE_BINARY_DIR}/anykvm.pc @ONLY)
install(FILES ${CMAKE_BINARY_DIR}/anykvm.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

if(ANYKVM_BUILD_TESTS AND TARGET anykvm_tool AND NOT ANYKVM_SANITIZE)
  add_test(NAME install.consumer COMMAND ${CMAKE_SOURCE_DIR}/tests/install/run ${CMAKE_BINARY_DIR})
  set_tests_properties(install.consumer PROPERTIES TIMEOUT 300 LABELS install)
endif()
