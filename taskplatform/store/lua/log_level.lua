-- Sets from which level on some processes log, for a time, or takes that back. They ask for it themselves.
-- ARGV[1] now   ARGV[2] for whom: a process, a node, a role or *   ARGV[3] level ('' takes it back)   ARGV[4] for how many ms
-- ARGV[5] actor   ARGV[6] size of the change log
-- Returns 1 when there is something new, or something was taken back, else 0.

local now, whom, level, span, actor = clock(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local last = 0
even_when_full()
local kept = call('HGETALL', K.log_levels)
for i = 1, #kept, 2 do
  local ends = tonumber(string.match(kept[i + 1], ' (%d+) '))
  if ends <= now then
    call('HDEL', K.log_levels, kept[i])
  elseif kept[i] ~= whom then
    last = math.max(last, ends)
  end
end
if level == '' then
  if call('HDEL', K.log_levels, whom) == 0 then return 0 end
  log_change(now, ARGV[6], actor, 'log level reset', whom, '')
  return 1
end
local ends = now + span
call('HSET', K.log_levels, whom, level .. ' ' .. text(ends) .. ' ' .. actor)
call('PEXPIRE', K.log_levels, text(math.max(last, ends) - now + 60000))
log_change(now, ARGV[6], actor, 'log level set', whom, level .. ' for ' .. text(math.floor(span / 1000)) .. ' s')
return 1
