-- A beat says that it lives, and is told how what it would publish stands to what the other beats would.
-- What a beat publishes, its catalogue and the settings that the scripts follow, has a number: the later one is newer. It gets one
-- when the first beat with it comes, and keeps it until the last one has signed off. So a deployment that begins later is
-- newer, and an old beat that dies and is started again beside others is not.
-- ARGV[1] now   ARGV[2] beat   ARGV[3] digest of what it would publish   ARGV[4] its number, as it was told ('' it has just started)
-- ARGV[5] 1: it leads   ARGV[6] a beat that was silent so long, in ms, does not live   ARGV[7] and after so long it is of no account
-- ARGV[8] what else it tells of itself, as JSON
-- Returns {number, newer}; newer is about what is newer than this: 2 a beat that lives, and has for a while, would publish it,
-- 1 there was such a beat not long ago and it did not sign off, 0 neither.

local now, beat, digest, number = clock(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4] ~= '' and ARGV[4] or '0')
local alive, account, since = tonumber(ARGV[6]), tonumber(ARGV[7]), text(now)
local others = {}
for name, line in pairs(pairs_to_table(call('HGETALL', K.beats))) do
  local its_digest, its_number, seen, leads, its_since = string.match(line, '^(%S+) (%S+) (%S+) (%S+) (%S+)$')
  if tonumber(seen) > now then
    -- the clock was set back: one that is dead must not live until that time comes again
    seen, its_since = text(now), text(math.min(now, tonumber(its_since)))
    call('HSET', K.beats, name, table.concat({ its_digest, its_number, seen, leads, its_since }, ' '))
  end
  local silent = now - tonumber(seen)
  if its_digest == digest then number = math.max(number, tonumber(its_number)) end
  if name == beat then
    if ARGV[4] ~= '' then since = its_since end
  elseif silent > 100 * account then
    call('HDEL', K.beats, name)
    call('HDEL', K.beat_info, name)
  else
    others[#others + 1] = { number = tonumber(its_number), silent = silent, lived = tonumber(seen) - tonumber(its_since) }
  end
end
if number == 0 then
  number = call('HINCRBY', K.planner, 'number', 1)
elseif number > tonumber(call('HGET', K.planner, 'number') or '0') then
  -- the data is another than it was when this beat started
  call('HSET', K.planner, 'number', number)
end
local newer = 0
for _, other in ipairs(others) do
  if other.number > number and other.silent <= account then
    -- for one that starts and dies, again and again, nobody stands aside
    newer = math.max(newer, other.silent <= alive and other.lived >= alive and 2 or 1)
  end
end
call('HSET', K.beats, beat, table.concat({ digest, text(number), text(now), ARGV[5], since }, ' '))
call('HSET', K.beat_info, beat, ARGV[8])
return { number, newer }
