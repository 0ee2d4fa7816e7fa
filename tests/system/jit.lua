-- Code that is compiled while it runs, thrown away and compiled again, elsewhere or over what lay there before.
-- Arguments: a seed, how many rounds. Prints a sum for each kind of work; the same for a seed and rounds wherever it runs.
--
-- LuaJIT compiles a loop or function ("trace") when it has run often enough, and a side exit of one when that has; the exit's
-- jump in the finished code is aimed at the new code then. Code lies in an area of limited size: when that is full, all of it
-- is dropped. Between compiling and running, mprotect() makes the area writable or executable.
local seed, rounds = tonumber(arg[1]), tonumber(arg[2])
local bit, ffi = require("bit"), require("ffi")
local compiled, dropped = 0, 0
jit.attach(function(what)
  if what == "stop" then compiled = compiled + 1 elseif what == "flush" then dropped = dropped + 1 end
end, "trace")
-- In KiB: an area that fills often.
jit.opt.start("hotloop=3", "hotexit=3", "sizemcode=32", "maxmcode=64", "maxtrace=400")

local state = seed
local function random(n)  -- the minimal standard generator: exact in doubles
  state = state * 16807 % 2147483647
  return state % n
end

local work = {}

-- New functions each time: other constants, other operations, other shapes of the loop.
function work.generated()
  local operations = {"+", "-", "*"}
  local lines = {"local x, t = ... for i = 1, 60 do"}
  for n = 1, 4 + random(12) do
    local kind = random(4)
    if kind == 0 then
      lines[#lines + 1] = ("if x %% %d < %d then x = x %s %d end"):format(2 + random(9), 1 + random(5), operations[1 + random(3)],
                                                                         random(1000))
    elseif kind == 1 then
      lines[#lines + 1] = ("t[i %% %d + 1] = x"):format(1 + random(30))
    elseif kind == 2 then
      lines[#lines + 1] = ("x = x + (t[%d] or %d)"):format(1 + random(30), random(100))
    else
      lines[#lines + 1] = ("x = bit.bxor(x, bit.rol(i, %d))"):format(random(32))
    end
    lines[#lines + 1] = "x = x % 1000003"
  end
  lines[#lines + 1] = "end return x"
  local f = assert(loadstring("local bit = bit " .. table.concat(lines, "\n")))
  local sum = 0
  for n = 1, 4 do sum = (sum * 31 + f(random(1000), {})) % 1000003 end
  return sum
end

-- Branches that go one way for long and then the other: side exits become hot.
function work.branches()
  local sum, way = 0, random(7)
  for i = 1, 600 do
    if i % (20 + way) == 0 then way = (way + i) % 7 end
    if way == 0 then sum = sum + i
    elseif way == 1 then sum = bit.bxor(sum, i)
    elseif way == 2 then sum = sum * 3 % 65521
    elseif way == 3 then sum = sum - 2 * i
    elseif way == 4 then sum = sum + #tostring(i)
    else sum = sum + i % way end
  end
  return sum % 1000003
end

-- Types change under compiled code.
function work.types()
  local function add(a, b) return a + b end
  local sum = random(1000)
  for i = 1, 400 do
    local value = i % 7 == 0 and tostring(i) or i % 3 == 0 and i + 0.5 or i
    sum = add(sum, value) % 1000003
  end
  return sum
end

function work.strings()
  local parts = {}
  for i = 1, 120 do parts[#parts + 1] = ("%x"):format(random(65536)):rep(1 + i % 3) end
  local text, sum = table.concat(parts, ","), 0
  for i = 1, #text do sum = (sum * 33 + text:byte(i)) % 16777213 end
  for number in text:gmatch("%x+") do sum = (sum + tonumber(number:sub(1, 4), 16)) % 16777213 end
  return sum
end

-- Loads and stores of every size, floating point.
function work.memory()
  local bytes, words = ffi.new("uint8_t[4096]"), ffi.new("int16_t[2048]")
  local longs, doubles = ffi.new("uint64_t[512]"), ffi.new("double[512]")
  for i = 0, 511 do
    longs[i] = longs[(i + 511) % 512] * 6364136223846793005ULL + i
    doubles[i] = math.sqrt(i + random(10)) * 0.5
  end
  ffi.copy(bytes, longs, 4096)
  for i = 0, 2047 do words[i] = words[(i * 7) % 2048] + bytes[2 * i] - bytes[2 * i + 1] end
  local sum, real = 0, 0
  for i = 0, 2047 do sum = (sum * 31 + words[i]) % 1000003 end
  for i = 0, 511 do real = real + doubles[i] * doubles[511 - i] end
  return ("%d/%.17g"):format(sum, real)
end

function work.recursion()
  local function ways(n, m) return (n == 0 or m == 0) and 1 or ways(n - 1, m) + ways(n, m - 1) end
  return ways(6, 4 + random(3))
end

-- C calls a function that is made on the spot.
ffi.cdef "void qsort(void* base, size_t count, size_t size, int (*compare)(const uint32_t*, const uint32_t*));"
local function sort(values, count, compare) ffi.C.qsort(values, count, 4, compare) end
jit.off(sort)  -- compiled code may not call what calls back
function work.callbacks()
  local values, sum = ffi.new("uint32_t[40]"), 0
  for i = 0, 39 do values[i] = random(1000000) end
  local compare = ffi.cast("int (*)(const uint32_t*, const uint32_t*)", function(a, b)
    return a[0] < b[0] and -1 or a[0] > b[0] and 1 or 0
  end)
  sort(values, 40, compare)
  compare:free()
  for i = 0, 39 do sum = (sum * 31 + values[i]) % 1000003 end
  return sum
end

local names, sums = {}, {}
for name in pairs(work) do names[#names + 1], sums[name] = name, 0 end
table.sort(names)
for round = 1, rounds do
  for _, name in ipairs(names) do
    for byte in tostring(work[name]()):gmatch(".") do sums[name] = (sums[name] * 33 + byte:byte()) % 4294967291 end
  end
  if round % 8 == 0 then jit.flush() end
end
for _, name in ipairs(names) do print(("%d %s %.0f"):format(seed, name, sums[name])) end
io.stderr:write(("compiled %d dropped %d\n"):format(compiled, dropped))
