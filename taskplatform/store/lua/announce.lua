-- Tells the change log of the definitions that were published for the first time since it was told last.
-- ARGV[1] now   ARGV[2] actor   ARGV[3] size of the change log
-- Returns how many there were.

local now, names = clock(ARGV[1]), call('SMEMBERS', K.unannounced)
if #names == 0 then return 0 end
table.sort(names)
call('DEL', K.unannounced)
log_change(now, ARGV[3], ARGV[2], 'definitions added', table.concat(names, ' '), #names .. ' definitions')
return #names
