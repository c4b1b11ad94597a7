-- Holds a host back by hand, or lets it go again.
-- ARGV[1] now   ARGV[2] host   ARGV[3] for how many ms, 0: let it go   ARGV[4] why   ARGV[5] actor   ARGV[6] size of the change log
-- ARGV[7] a mark of this call: one that is sent again, because its answer was lost, is answered as the first time
-- Returns 1, or 0 where it was not held back and is to be let go.

local now, host, span, why = clock(ARGV[1]), ARGV[2], tonumber(ARGV[3]), ARGV[4]
local breaker = breaker_of(host)
if span == 0 then
  if not breaker then return 0 end
  free_host(host, now)
  log_change(now, ARGV[6], ARGV[5], 'breaker reset', host, breaker.why)
  release(now, 100)
  return 1
end
if breaker and breaker.mark == ARGV[7] then return 1 end
hold_host(host, 'open', span, why, now)
breaker = breaker_of(host)
breaker.mark = ARGV[7]
keep_breaker(host, breaker)
log_change(now, ARGV[6], ARGV[5], 'breaker opened', host, string.format('%.10g', span / 1000) .. ' s: ' .. why)
return 1
