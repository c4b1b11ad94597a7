-- Sets a limit or takes it away, at once for all that waits.
-- ARGV[1] now   ARGV[2] limit   ARGV[3] 'live' or 'configured'   ARGV[4] "<rate per second> <burst> <concurrency>", '-' for none;
-- '' takes it away, and what is configured is in force again   ARGV[5] actor   ARGV[6] size of the change log
-- ARGV[7] the term of the leader that says so ('' whoever it is)
-- Returns 1 when that changed what is in force, 0 when not, -1 when another leads by now.

local now, name, layer, value = clock(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
if not leads(ARGV[7]) then return -1 end
local function in_words(limit)
  if not limit then return 'none' end
  local words = {}
  if limit.rate then words[1] = string.format('%.10g', limit.rate) .. '/s burst ' .. limit.burst end
  if limit.concurrency then words[#words + 1] = 'concurrency ' .. limit.concurrency end
  return #words > 0 and table.concat(words, ' ') or 'none, set live'
end

local changed = set_limit(name, layer == 'live' and K.limits_live or K.limits_configured, value, now)
if changed == 1 then
  log_change(now, ARGV[6], ARGV[5], 'limit changed', name, in_words(limit_of(name)))
  release(now, 100)
end
return changed
