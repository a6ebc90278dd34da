# pyengine._cuda, the ops on NVIDIA devices: a module of its own, so that _C never needs CUDA.
#   PYENGINE_CUDA=auto  where nvcc and a GPU are present, for that GPU
#   PYENGINE_CUDA=on    for every supported architecture and as PTX for later ones (or PYENGINE_CUDA_ARCHITECTURES)
#   PYENGINE_CUDA=off   never
set(PYENGINE_CUDA auto CACHE STRING "Build the CUDA kernels: auto, on or off")
set(PYENGINE_CUDA_ARCHITECTURES "" CACHE STRING "Architectures as CMake names them; empty: as PYENGINE_CUDA says")
set(all_architectures 80-real 86-real 89-real 90a-real 100-real 120)

string(TOLOWER "${PYENGINE_CUDA}" wanted)
if(NOT wanted MATCHES "^(auto|on|off|1|0|true|false)$")
  message(FATAL_ERROR "pyengine: expected PYENGINE_CUDA to be auto, on or off but got ${PYENGINE_CUDA}")
endif()
if(wanted MATCHES "^(off|0|false)$")
  return()
endif()

find_program(PYENGINE_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin)
if(NOT PYENGINE_NVCC)
  if(wanted STREQUAL auto)
    message(STATUS "pyengine: no nvcc, so the package is built for CPUs only")
    return()
  endif()
  message(FATAL_ERROR "pyengine: PYENGINE_CUDA=${PYENGINE_CUDA} needs nvcc but there is none on PATH: install the CUDA toolkit")
endif()

include(csrc/cmake/cuda_architectures.cmake)
set(architectures ${PYENGINE_CUDA_ARCHITECTURES})
if(NOT architectures AND wanted STREQUAL auto)
  pyengine_architectures_here(architectures)
  if(NOT architectures)
    return()
  endif()
elseif(NOT architectures)
  set(architectures ${all_architectures})
endif()

set(CMAKE_CUDA_COMPILER ${PYENGINE_NVCC})
set(CMAKE_CUDA_ARCHITECTURES ${architectures})
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
message(STATUS "pyengine: CUDA kernels for ${architectures}")

set(instances)
foreach(type bfloat16 float16)
  foreach(head_dim 64 72 128)
    set(instance ${CMAKE_CURRENT_BINARY_DIR}/cuda/frame_window_attention_${type}_${head_dim}.cu)
    configure_file(csrc/ops/frame_window_attention/cuda_instance.cu.in ${instance} @ONLY)
    list(APPEND instances ${instance})
  endforeach()
endforeach()

# Of the folder of an op: every .cu, cuda*.cc, and bind.cc if the op has a cuda.cu.
file(GLOB kernels CONFIGURE_DEPENDS csrc/ops/*/*.cu)
file(GLOB sources CONFIGURE_DEPENDS csrc/ops/*/cuda*.cc)
foreach(kernel ${kernels})
  if(kernel MATCHES "/cuda[.]cu$")
    string(REPLACE "/cuda.cu" "/bind.cc" binding ${kernel})
    list(APPEND sources ${binding})
  endif()
endforeach()
pybind11_add_module(_cuda MODULE NO_EXTRAS
  csrc/bindings/arguments.cc
  csrc/bindings/cuda_module.cc
  csrc/bindings/device_array.cc
  csrc/bindings/op_binding.cc
  csrc/core/cuda/device_info.cc
  csrc/core/tensor.cc
  ${sources}
  ${kernels}
  ${instances})
target_compile_definitions(_cuda PRIVATE PYENGINE_BIND_CUDA)
if("${architectures}" MATCHES "(^|;)90a")
  target_compile_definitions(_cuda PRIVATE PYENGINE_HAVE_SM90A)  # code for 9.0 without the "a" traps in kernels for warpgroups
endif()
target_include_directories(_cuda PRIVATE csrc ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-O2;${warnings}>)
set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
install(TARGETS _cuda LIBRARY DESTINATION pyengine)
add_dependencies(extensions _cuda)

# The compiler's report of registers, shared memory and spills, one file per kernel source; a spill fails the build.
set(reports ${CMAKE_CURRENT_BINARY_DIR}/cuda/registers)
set(python ${Python_EXECUTABLE} ${PYTHON_EXECUTABLE})  # pybind11 sets one of them, scikit-build both
list(GET python 0 python)
set(ptxas ${python} ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cmake/ptxas_report.py)
set_target_properties(_cuda PROPERTIES CUDA_COMPILER_LAUNCHER "${ptxas};compile;${reports}")
add_custom_command(TARGET _cuda POST_BUILD COMMAND ${ptxas} print ${reports} VERBATIM)
