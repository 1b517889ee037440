# Counts, keeps a hash and a file, and talks to a child over two channels. usage: counter.pl DIR
use strict;
use warnings;
use IO::Handle;
use IPC::Open2;

my ($dir) = @ARGV;
sub say_to {
    my ($name, $text) = @_;
    open my $out, '>', "$dir/.$name" or die $!;
    print $out $text;
    close $out;
    rename "$dir/.$name", "$dir/$name" or die $!;
}
my $pid = open2(my $from, my $to, $^X, '-ne', '$| = 1; chomp; print $_ * $_, "\n"');
open my $journal, '+>', "$dir/work/journal" or die $!;
$journal->autoflush(1);
my ($n, $verdict, %seen) = (0, 'PASS');
until (-e "$dir/check-request") {
    print $to "$n\n";
    $to->flush;
    chomp(my $square = <$from>);
    $verdict = "FAIL: $n squared is $square" if $square != $n * $n;
    print $journal "$n\n";
    $seen{$n} = $square;
    say_to('ready', $$) if ++$n == 10;
    select undef, undef, undef, 0.003;
}
close $to;
waitpid $pid, 0;
$verdict = "FAIL: the child ended with $?" if $?;
seek $journal, 0, 0;
my @lines = <$journal>;
$verdict = "FAIL: the file has lost or doubled lines" if join('', @lines) ne join('', map { "$_\n" } 0 .. $n - 1);
$verdict = "FAIL: the hash has changed" if grep { $seen{$_} != $_ * $_ } 0 .. $n - 1;
say_to('result', $verdict);
