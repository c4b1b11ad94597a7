-- Counts what a backfill would make of these subscribers and occurrences of a group. It changes nothing.
-- ARGV[1] now   ARGV[2] definition   ARGV[3] <gid>   ARGV[4] how many of the following are times
-- ARGV[5…] times of occurrences, and after them users
-- Returns {how many it would make, exist, are left out because they are paused, disabled}.

local _, definition, gid, last = clock(ARGV[1]), ARGV[2], ARGV[3], 4 + tonumber(ARGV[4])
local found = { make = 0, exists = 0, paused = 0, disabled = 0, elsewhere = 0 }
for i = 5, #ARGV do
  if i > last then
    for j = 5, last do
      local verdict = backfills.verdict(ARGV[i], definition, gid, ARGV[j])
      found[verdict] = found[verdict] + 1
      if verdict == 'elsewhere' then break end
    end
  end
end
return { found.make, found.exists, found.paused, found.disabled }
