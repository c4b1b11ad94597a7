-- Tells the audit log who did what.
-- ARGV[1] now   ARGV[2] kind   ARGV[3] size of the log of this kind   ARGV[4…] what is told, by twos: field and value
-- Returns 1.

local now = clock(ARGV[1])
even_when_full()
audit(now, ARGV[2], ARGV[3], unpack(ARGV, 4))
return 1
